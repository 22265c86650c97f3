//! What the kernel programs count.

/// Why a verdict fell; the index of its counter. New ones are added at the end.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Sent to the agent.
    Redirected = 0,
    /// Left alone: an exempt cgroup, or a hostNetwork pod under `pass`.
    Exempt = 1,
    /// Denied: not port 80.
    OtherPort = 2,
    /// Denied: a datagram, or a datagram socket's connect.
    Datagram = 3,
    /// Denied: the agent has not renewed its lease.
    NoLease = 4,
    /// Denied: the agent has no listener for this form of the address.
    NoTarget = 5,
    /// Denied: the network namespace holds too many connections.
    Quota = 6,
    /// Denied: the kernel could not record who is calling.
    NoRecord = 7,
    /// Not IMDS traffic; never counted.
    Unrelated = 8,
}

impl Reason {
    /// Those that are counted, in the order of their indices.
    pub const COUNTED: [Self; 8] = [
        Self::Redirected,
        Self::Exempt,
        Self::OtherPort,
        Self::Datagram,
        Self::NoLease,
        Self::NoTarget,
        Self::Quota,
        Self::NoRecord,
    ];

    /// Its name in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redirected => "redirected",
            Self::Exempt => "exempt",
            Self::OtherPort => "denied_port",
            Self::Datagram => "denied_datagram",
            Self::NoLease => "denied_lease",
            Self::NoTarget => "denied_target",
            Self::Quota => "denied_quota",
            Self::NoRecord => "denied_record",
            Self::Unrelated => "unrelated",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_reasons_stand_at_their_own_index() {
        for (index, reason) in Reason::COUNTED.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{}", reason.name());
        }
    }
}

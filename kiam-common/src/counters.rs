//! What the kernel programs count.

/// Why a verdict fell; the index of its counter. New ones are added at the end.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VerdictReason {
    /// Sent to the agent's listener on the node.
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
    /// Denied: the pod holds too many connections.
    Quota = 6,
    /// Denied: the kernel could not record who is calling.
    NoRecord = 7,
    /// Denied: the agent's own address was asked for, not the IMDS.
    Direct = 8,
    /// Denied: what listens at the agent's address is not the agent.
    NoListener = 9,
    /// Denied: a pod on the node's network would have bound a port of the agent.
    Bind = 10,
    /// Dropped: a SYN for the agent's listener that no recorded connect has sent.
    Syn = 11,
    /// Dropped: a packet for the IMDS that a socket of a pod has sent past the other hooks.
    Guard = 12,
    /// Dropped: the same where it would have left the node.
    Uplink = 13,
    /// Only seen (`--mode=observe`).
    Observed = 14,
    /// Sent to the agent's listener inside the caller's network namespace.
    RedirectedToPodListener = 15,
    /// Denied: there is no listener inside the caller's network namespace (`--path=pod-local`).
    NoPodListener = 16,
    /// Denied: the caller's network namespace is not known to be its pod's.
    Namespace = 17,
    /// Denied: more pods hold connections than the kernel's maps have room for, or there is no memory for them.
    Full = 18,
    /// Neither for the IMDS nor for the agent; never counted.
    Unrelated = u32::MAX,
}

impl VerdictReason {
    /// Those that are counted, in the order of their indices.
    pub const COUNTED: [Self; 19] = [
        Self::Redirected,
        Self::Exempt,
        Self::OtherPort,
        Self::Datagram,
        Self::NoLease,
        Self::NoTarget,
        Self::Quota,
        Self::NoRecord,
        Self::Direct,
        Self::NoListener,
        Self::Bind,
        Self::Syn,
        Self::Guard,
        Self::Uplink,
        Self::Observed,
        Self::RedirectedToPodListener,
        Self::NoPodListener,
        Self::Namespace,
        Self::Full,
    ];

    /// Entries of the counters' map: with room, so that new reasons leave the pinned maps' layout as it is.
    pub const ROOM: u32 = 64;

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
            Self::Direct => "denied_direct",
            Self::NoListener => "denied_listener",
            Self::Bind => "denied_bind",
            Self::Syn => "dropped_syn",
            Self::Guard => "dropped_guard",
            Self::Uplink => "dropped_uplink",
            Self::Observed => "observed",
            Self::RedirectedToPodListener => "redirected_inside",
            Self::NoPodListener => "denied_path",
            Self::Namespace => "denied_namespace",
            Self::Full => "denied_full",
            Self::Unrelated => "unrelated",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_reasons_stand_at_their_own_index() {
        for (index, reason) in VerdictReason::COUNTED.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{}", reason.name());
        }
        assert!(VerdictReason::COUNTED.len() <= VerdictReason::ROOM as usize);
    }
}

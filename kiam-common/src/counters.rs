//! The reasons of verdicts, which the kernel programs count.

/// The reason of a verdict, and the index of its counter. New ones are added at the end.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VerdictReason {
    /// Redirected to the node listener.
    Redirected = 0,
    /// Passed: an exempt cgroup, or a hostNetwork pod under `pass`.
    Exempt = 1,
    /// Denied: not port 80.
    OtherPort = 2,
    /// Denied: a datagram, or a datagram socket's connect.
    Datagram = 3,
    /// Denied: the agent has not renewed its lease.
    NoLease = 4,
    /// Denied: the agent has no listener for this form of the address.
    NoTarget = 5,
    /// Denied: the pod has too many connections.
    Quota = 6,
    /// Denied: the kernel could not record the caller.
    NoRecord = 7,
    /// Denied: the destination is the agent's own address, not the IMDS.
    Direct = 8,
    /// Denied: the listener at the agent's address is not the agent's.
    NoListener = 9,
    /// Denied: a pod on the node's network would have bound a port of the agent.
    Bind = 10,
    /// Dropped: a SYN to the node listener without a recorded connect.
    Syn = 11,
    /// Dropped: a packet of a pod's socket to the IMDS that bypassed the connect hooks.
    Guard = 12,
    /// Dropped: the same at the uplink.
    Uplink = 13,
    /// Only observed (`--mode=observe`).
    Observed = 14,
    /// Redirected to the pod listener in the caller's network namespace.
    RedirectedToPodListener = 15,
    /// Denied: the caller's network namespace has no pod listener (`--path=pod-local`).
    NoPodListener = 16,
    /// Denied: the caller's network namespace is not known to be its pod's.
    Namespace = 17,
    /// Denied: the kernel's maps are full, or there is no memory for an entry.
    Full = 18,
    /// Neither for the IMDS nor for the agent; never counted.
    Unrelated = u32::MAX,
}

impl VerdictReason {
    /// All counted reasons, in the order of their indices.
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

    /// The number of counters, including unused ones, so that new reasons don't change the layout of the pinned maps.
    pub const ROOM: u32 = 64;

    /// The label in metrics.
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
    fn counted_reasons_are_at_their_own_index() {
        for (index, reason) in VerdictReason::COUNTED.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{}", reason.name());
        }
        assert!(VerdictReason::COUNTED.len() <= VerdictReason::ROOM as usize);
    }
}

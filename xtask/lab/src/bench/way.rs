//! The ways by which a pod's request can come to the agent.

use std::net::SocketAddr;

use lab::{AGENT_PORT, IMDS_V4, NODE_V4};

/// A way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// To the node's address: no hook, no translation.
    Direct,
    /// The kernel program redirects to the node's address.
    Node,
    /// The kernel program redirects to a listener in the pod's own namespace.
    PodLocal,
    /// An iptables rule, as kiam has it.
    Iptables(Place),
    /// A chain of nftables.
    Nftables(Place),
}

/// Where the DNAT is, seen from kube-proxy's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// After them.
    Last,
    /// Before them.
    First,
}

// === impl Way ===

impl Way {
    /// All of them; what others are compared with is the first.
    pub(super) const ALL: [Self; 7] = [
        Self::Direct,
        Self::Node,
        Self::PodLocal,
        Self::Iptables(Place::Last),
        Self::Iptables(Place::First),
        Self::Nftables(Place::Last),
        Self::Nftables(Place::First),
    ];

    /// Its name in a table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Node => "eBPF, node path",
            Self::PodLocal => "eBPF, pod-local",
            Self::Iptables(Place::Last) => "iptables DNAT, last",
            Self::Iptables(Place::First) => "iptables DNAT, first",
            Self::Nftables(Place::Last) => "nftables DNAT, last",
            Self::Nftables(Place::First) => "nftables DNAT, first",
        }
    }

    /// Whether the kernel program makes it.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Node | Self::PodLocal)
    }

    /// What the pod connects to.
    pub(super) fn destination(self) -> SocketAddr {
        match self {
            Self::Direct => (NODE_V4, AGENT_PORT).into(),
            _ => (IMDS_V4, 80).into(),
        }
    }

    /// The agent's flags; an agent that has no `--path` knows the node's path only.
    pub(super) fn flags(self, has_path: bool) -> Vec<&'static str> {
        let mut flags = vec!["--level=info"];
        match self {
            // The proof of itself, once a minute, would be in the way of what is measured.
            Self::Node | Self::PodLocal => flags.push("--selftest-interval=24h"),
            _ => flags.push("--interceptor=off"),
        }
        match self {
            Self::Node if has_path => flags.push("--path=node"),
            Self::PodLocal => flags.push("--path=pod-local"),
            _ => {}
        }
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernel_programs_ways_attach_it_and_only_direct_connects_to_the_node() {
        for way in Way::ALL {
            let flags = way.flags(true);
            let path = flags.iter().find_map(|flag| flag.strip_prefix("--path="));
            let wanted = match way {
                Way::Node => Some("node"),
                Way::PodLocal => Some("pod-local"),
                _ => None,
            };
            assert_eq!(path, wanted, "{way:?}");
            assert_eq!(flags.contains(&"--interceptor=off"), wanted.is_none(), "{way:?}");
            assert_eq!(way.is_ours(), wanted.is_some(), "{way:?}");
            let asks_the_node = way.destination() == (NODE_V4, AGENT_PORT).into();
            assert_eq!(asks_the_node, way == Way::Direct, "{way:?}");
        }
    }

    #[test]
    fn an_agent_without_paths_is_not_asked_for_one() {
        assert!(!Way::Node.flags(false).iter().any(|flag| flag.starts_with("--path")));
    }
}

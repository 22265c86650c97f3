//! Which of the watched pods are this node's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Pod;

/// Which of the watched pods are this node's.
#[derive(Clone, Copy, Debug)]
pub enum NodePods {
    /// All: the watch is of this node alone.
    Watched,
    /// Those whose node has one of these addresses.
    OfAddresses(Option<Ipv4Addr>, Option<Ipv6Addr>),
}

// === impl NodePods ===

impl NodePods {
    /// Whether `pod` is this node's.
    #[must_use]
    pub fn includes(self, pod: &Pod) -> bool {
        match (self, pod.host_ip) {
            (Self::Watched, _) => true,
            (Self::OfAddresses(v4, _), Some(IpAddr::V4(address))) => v4 == Some(address),
            (Self::OfAddresses(_, v6), Some(IpAddr::V6(address))) => v6 == Some(address),
            (Self::OfAddresses(..), None) => false,
        }
    }

    /// The same as a function.
    pub fn filter(self) -> impl Fn(&Pod) -> bool + Send + Sync + 'static {
        move |pod| self.includes(pod)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_nodes_name_its_addresses_say_which_pods_are_its_own() {
        let (v4, v6) = (Ipv4Addr::new(10, 0, 0, 1), "fd00::1".parse().unwrap());
        let node = NodePods::OfAddresses(Some(v4), Some(v6));
        let v4_only = NodePods::OfAddresses(Some(v4), None);
        let other = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
        for (host_ip, of_both, of_v4) in [
            (Some(v4.into()), true, true),
            (Some(v6.into()), true, false),
            (Some(other), false, false),
            (None, false, false),
        ] {
            let pod = Pod { host_ip, ..Pod::test(1) };
            assert_eq!(node.includes(&pod), of_both, "{host_ip:?}");
            assert_eq!(v4_only.includes(&pod), of_v4, "{host_ip:?}");
            assert!(NodePods::Watched.includes(&pod), "{host_ip:?}");
        }
    }
}

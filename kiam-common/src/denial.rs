//! Decides the denials that depend on more than a destination: of redirects whose caller is not certain or has too many
//! connections, of binds of the agent's ports, and of packets that bypassed the connect hooks.
//!
//! What is expensive to ask is a closure, which is called only where the answer decides.

use crate::{CgroupMark, ListenerPath, POD_QUOTA, client::Sandbox, counters::VerdictReason};

/// The socket of a connect that is to be redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedirectedSocket {
    /// Whether the connect goes to a pod listener, not to a node listener.
    pub pod_listener: bool,
    /// Whether the socket is in the node's network namespace.
    pub on_host: bool,
    /// Whether the socket is bound to an interface (`SO_BINDTODEVICE`): it can't reach the loopback of its namespace.
    pub bound: bool,
}

/// The sender of a packet to the IMDS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A socket that connect let through, or one of the agent's own pod.
    Passed,
    /// Another socket of the pods' cgroup.
    Pod,
    /// A socket of the node, outside the pods' cgroup.
    Node,
    /// No socket: the packet was forwarded, or the kernel made it.
    NoSocket,
}

// === impl RedirectedSocket ===

impl RedirectedSocket {
    /// The denial of a redirect to a listener that `path` does not allow, or from a socket whose identity would be
    /// ambiguous.
    #[inline(always)]
    #[must_use]
    pub fn path_denial(self, path: u32) -> Option<VerdictReason> {
        if !self.pod_listener && !self.on_host && ListenerPath::PodLocal.is(path) {
            return Some(VerdictReason::NoPodListener);
        }
        // Pods on the node's network share one namespace. A socket that is bound to an interface may have the same ends
        // there as another one, which would then get no answer.
        if self.on_host && self.bound {
            return Some(VerdictReason::Namespace);
        }
        None
    }

    /// The denial of a redirect for `pod`, which is 0 for an unknown one. `is_agents`: whether the listener at the
    /// destination in the socket's namespace is the agent's.
    #[inline(always)]
    #[must_use]
    pub fn listener_denial(
        self,
        pod: u64,
        is_agents: impl FnOnce() -> bool,
    ) -> Option<VerdictReason> {
        if pod == 0 {
            return Some(VerdictReason::Namespace);
        }
        // The node listener can't be looked up from other namespaces.
        if (self.pod_listener || self.on_host) && !is_agents() {
            return Some(VerdictReason::NoListener);
        }
        None
    }
}

// === impl Sender ===

impl Sender {
    /// The sender of this socket's cgroup: `nearest` is the mark of its nearest marked cgroup.
    #[inline(always)]
    #[must_use]
    pub fn of(nearest: u32, below_pods: bool) -> Self {
        if CgroupMark::Pass.is(nearest) {
            Self::Passed
        } else if below_pods {
            Self::Pod
        } else {
            Self::Node
        }
    }

    /// The denial of a packet of the pods' cgroup.
    #[inline(always)]
    #[must_use]
    pub fn guard_denial(self) -> Option<VerdictReason> {
        (self != Self::Passed).then_some(VerdictReason::Guard)
    }

    /// The denial of a packet that leaves the node. `forwarded`: whether it came in by an interface.
    #[inline(always)]
    #[must_use]
    pub fn uplink_denial(self, forwarded: impl FnOnce() -> bool) -> Option<VerdictReason> {
        let denied = match self {
            Self::Passed | Self::Node => false,
            Self::Pod => true,
            Self::NoSocket => forwarded(),
        };
        denied.then_some(VerdictReason::Uplink)
    }
}

/// Whether a caller in the network namespace of `sandbox` has its pod listener. `bound`: whether its socket is bound to an
/// interface.
#[inline(always)]
#[must_use]
pub fn has_pod_listener(sandbox: Sandbox, path: u32, bound: impl FnOnce() -> bool) -> bool {
    sandbox.v4 != 0 && !ListenerPath::Node.is(path) && !bound()
}

/// The denial of a connection beside `others`, the open ones of its pod.
#[inline(always)]
#[must_use]
pub fn quota_denial(others: i64) -> Option<VerdictReason> {
    (others >= POD_QUOTA).then_some(VerdictReason::Quota)
}

/// The denial of a bind: on the node's network only the agent binds its ports. `takes`: whether a stream binds one of them.
#[inline(always)]
#[must_use]
pub fn bind_denial(
    takes: bool,
    on_host: impl FnOnce() -> bool,
    is_agent: impl FnOnce() -> bool,
) -> Option<VerdictReason> {
    (takes && on_host() && !is_agent()).then_some(VerdictReason::Bind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUTO: u32 = ListenerPath::Auto as u32;
    const POD_LOCAL: u32 = ListenerPath::PodLocal as u32;
    const NODE: u32 = ListenerPath::Node as u32;

    fn socket(pod_listener: bool, on_host: bool, bound: bool) -> RedirectedSocket {
        RedirectedSocket { pod_listener, on_host, bound }
    }

    #[test]
    fn a_pod_listener_is_used_where_there_is_one_that_the_socket_reaches() {
        let sandbox = |v4| Sandbox { pod: 7, v4, v6: 0, pad: 0 };
        for (v4, path, bound, has) in [
            (1, AUTO, false, true),
            (1, POD_LOCAL, false, true),
            (1, NODE, false, false),
            (1, AUTO, true, false),
            (0, AUTO, false, false),
        ] {
            assert_eq!(has_pod_listener(sandbox(v4), path, || bound), has, "{v4} {path} {bound}");
        }
    }

    #[test]
    fn pod_local_denies_the_node_listener_to_pods_with_a_network_of_their_own() {
        let denied = Some(VerdictReason::NoPodListener);
        for (pod_listener, on_host, path, denial) in [
            (false, false, POD_LOCAL, denied),
            (false, false, AUTO, None),
            (false, false, NODE, None),
            (true, false, POD_LOCAL, None),
            (false, true, POD_LOCAL, None),
        ] {
            let socket = socket(pod_listener, on_host, false);
            assert_eq!(socket.path_denial(path), denial, "{socket:?} {path}");
        }
    }

    #[test]
    fn sockets_bound_to_an_interface_are_denied_on_the_nodes_network_alone() {
        let denied = Some(VerdictReason::Namespace);
        for (on_host, bound, denial) in
            [(true, true, denied), (true, false, None), (false, true, None)]
        {
            let socket = socket(false, on_host, bound);
            assert_eq!(socket.path_denial(AUTO), denial, "{socket:?}");
        }
    }

    #[test]
    fn unknown_pods_and_others_listeners_are_denied() {
        let (unknown, others) = (Some(VerdictReason::Namespace), Some(VerdictReason::NoListener));
        for (pod_listener, on_host, pod, is_agents, denial) in [
            (true, false, 7, true, None),
            (true, false, 7, false, others),
            (false, true, 7, true, None),
            (false, true, 7, false, others),
            // The node listener, from a pod's namespace.
            (false, false, 7, false, None),
            (true, false, 0, true, unknown),
            (true, false, 0, false, unknown),
            (false, false, 0, false, unknown),
        ] {
            let socket = socket(pod_listener, on_host, false);
            let given = socket.listener_denial(pod, || is_agents);
            assert_eq!(given, denial, "{socket:?} {pod} {is_agents}");
        }
    }

    #[test]
    fn a_pod_has_as_many_connections_as_its_quota() {
        let denied = Some(VerdictReason::Quota);
        for (others, denial) in
            [(-1, None), (0, None), (POD_QUOTA - 1, None), (POD_QUOTA, denied), (i64::MAX, denied)]
        {
            assert_eq!(quota_denial(others), denial, "{others}");
        }
    }

    #[test]
    fn only_the_agent_binds_its_ports_on_the_nodes_network() {
        for (takes, on_host, is_agent, denied) in [
            (true, true, false, true),
            (true, true, true, false),
            (true, false, false, false),
            (false, true, false, false),
        ] {
            let denial = bind_denial(takes, || on_host, || is_agent);
            assert_eq!(denial.is_some(), denied, "{takes} {on_host} {is_agent}");
            assert!(denial.is_none_or(|reason| reason == VerdictReason::Bind));
        }
    }

    #[test]
    fn packets_are_judged_by_their_sender() {
        let (guard, uplink) = (Some(VerdictReason::Guard), Some(VerdictReason::Uplink));
        for (sender, forwarded, by_guard, by_uplink) in [
            (Sender::Passed, true, None, None),
            (Sender::Pod, false, guard, uplink),
            (Sender::Node, true, guard, None),
            (Sender::NoSocket, true, guard, uplink),
            (Sender::NoSocket, false, guard, None),
        ] {
            assert_eq!(sender.guard_denial(), by_guard, "{sender:?}");
            assert_eq!(sender.uplink_denial(|| forwarded), by_uplink, "{sender:?} {forwarded}");
        }
        for (nearest, below_pods, sender) in [
            (CgroupMark::Pass, true, Sender::Passed),
            (CgroupMark::Pass, false, Sender::Passed),
            (CgroupMark::Pods, true, Sender::Pod),
            (CgroupMark::Intercept, true, Sender::Pod),
            (CgroupMark::Intercept, false, Sender::Node),
            (CgroupMark::Unmarked, false, Sender::Node),
        ] {
            assert_eq!(Sender::of(nearest as u32, below_pods), sender, "{nearest:?} {below_pods}");
        }
    }
}

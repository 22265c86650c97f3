//! The names in the kernel object, by which the agent finds programs, maps and constants.
//!
//! The macros of `kiam-ebpf` take names as they are written there; a test of `kiam-kernel` compares the object with these.

/// The programs.
pub mod program {
    /// connect(2) of IPv4 sockets.
    pub const CONNECT4: &str = "kiam_connect4";
    /// connect(2) of IPv6 sockets.
    pub const CONNECT6: &str = "kiam_connect6";
    /// Datagrams of unconnected IPv4 sockets.
    pub const SENDMSG4: &str = "kiam_sendmsg4";
    /// Datagrams of unconnected IPv6 sockets.
    pub const SENDMSG6: &str = "kiam_sendmsg6";
    /// bind(2) of IPv4 sockets.
    pub const BIND4: &str = "kiam_bind4";
    /// bind(2) of IPv6 sockets.
    pub const BIND6: &str = "kiam_bind6";
    /// getpeername(2) of IPv4 sockets.
    pub const GETPEERNAME4: &str = "kiam_getpeername4";
    /// getpeername(2) of IPv6 sockets.
    pub const GETPEERNAME6: &str = "kiam_getpeername6";
    /// TCP's events.
    pub const SOCK_OPS: &str = "kiam_sock_ops";
    /// The filter of SYNs at the node listener.
    pub const LISTENER: &str = "kiam_listener";
    /// The guard of the pods' packets.
    pub const GUARD: &str = "kiam_guard";
    /// The guard of the node's uplinks.
    pub const UPLINK: &str = "kiam_uplink";
    /// The self-test's rewriter of addresses.
    pub const REWRITE: &str = "kiam_rewrite";
    /// What reads the cookie of the node's network namespace.
    pub const NAMESPACE: &str = "kiam_namespace";

    /// All of them.
    pub const ALL: [&str; 14] = [
        CONNECT4,
        CONNECT6,
        SENDMSG4,
        SENDMSG6,
        BIND4,
        BIND6,
        GETPEERNAME4,
        GETPEERNAME6,
        SOCK_OPS,
        LISTENER,
        GUARD,
        UPLINK,
        REWRITE,
        NAMESPACE,
    ];
}

/// The maps.
pub mod map {
    /// When the agent renewed its lease.
    pub const LEASE: &str = "LEASE";
    /// The pods' network namespaces.
    pub const SANDBOXES: &str = "SANDBOXES";
    /// The marks of cgroups.
    pub const CGROUPS: &str = "CGROUPS";
    /// The records of redirected sockets.
    pub const CLIENTS: &str = "CLIENTS";
    /// The processes that called connect.
    pub const CALLERS: &str = "CALLERS";
    /// The agent's listeners.
    pub const LISTENERS: &str = "LISTENERS";
    /// The sockets that connect let through.
    pub const PASSED: &str = "PASSED";
    /// The openers of connections.
    pub const FLOWS: &str = "FLOWS";
    /// The connection counts of pods.
    pub const PODS: &str = "PODS";
    /// The processes that opened connections.
    pub const PROCESSES: &str = "PROCESSES";
    /// The callers of the IMDS, as they are observed.
    pub const OBSERVED: &str = "OBSERVED";
    /// The counters of verdicts.
    pub const COUNTERS: &str = "COUNTERS";
    /// Since when links intercept.
    pub const ATTACHED: &str = "ATTACHED";
    /// The cookie that [`super::program::NAMESPACE`] recorded.
    pub const PROBE_NETNS: &str = "PROBE_NETNS";

    /// Those that are pinned.
    pub const PINNED: [&str; 13] = [
        LEASE, SANDBOXES, CGROUPS, CLIENTS, CALLERS, LISTENERS, PASSED, FLOWS, PODS, PROCESSES,
        OBSERVED, COUNTERS, ATTACHED,
    ];
}

/// The constants that the agent sets before it loads the programs, which fails where one is missing.
pub mod constant {
    /// The node listeners.
    pub const TARGET: &str = "TARGET";
    /// The agent's ports.
    pub const AGENT_PORTS: &str = "AGENT_PORTS";
    /// The cookie of the node's network namespace.
    pub const HOST_NETNS: &str = "HOST_NETNS";
    /// Whether the node's network namespace passes.
    pub const HOST_NETWORK_PASSES: &str = "HOST_NETWORK_PASSES";
    /// Whether pods' network namespaces are known.
    pub const NAMESPACES_ARE_KNOWN: &str = "NAMESPACES_ARE_KNOWN";
    /// Whether connects are only counted.
    pub const OBSERVES: &str = "OBSERVES";
    /// The [`crate::ListenerPath`].
    pub const PATH: &str = "PATH";
    /// The cookie of the socket whose namespace is read.
    pub const PROBE_SOCKET: &str = "PROBE_SOCKET";
}

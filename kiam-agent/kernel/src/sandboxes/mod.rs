//! Follows the pods' sandboxes: from a pod's cgroup to its network namespace to the pod listener inside it.
//!
//! The one rule: a namespace is a pod's if the kernel shows a process of the pod's cgroup in it, if it is neither the
//! node's nor another pod's, and if it has one of the pod's addresses, once these are known. Nothing that a container can
//! name or create counts.

mod claims;
mod follow;
mod listen;
mod metrics;
mod processes;
mod reader;
mod sandbox;
mod scan;
mod thread;
mod unplaced;
mod watch;
mod watches;

use std::{fmt, io, net::TcpListener, time::Duration};

use crate::sys::Cgroup;
use kiam_core::{lifecycle::Latch, pods::PodUid};

pub use self::{
    follow::Sandboxes, metrics::Metrics, reader::SandboxReader, thread::on_realtime_thread,
    unplaced::Unplaced,
};

/// The most namespaces of one pod with listeners. One is normal, two while a sandbox is recreated.
const NAMESPACES: usize = 4;
/// Concurrent scans, urgent ones and ordinary ones each: as many as successive pod starts use on a small node.
const SCANS_AT_ONCE: usize = 4;
/// The most descriptors of one scan: processes' folders and namespaces, and sockets.
const FILES_PER_SCAN: usize = 2 * processes::CANDIDATES + 16;

/// The configuration of [`Sandboxes`].
#[derive(Clone, Debug)]
pub struct Config {
    /// The pods' cgroup.
    pub cgroup: Cgroup,
    /// The interval of full sweeps.
    pub sweep: Duration,
    /// Whether to open pod listeners.
    pub listens: bool,
    /// Set while every pod's cgroup is watched.
    pub watched: Latch,
}

/// A pod's network namespace, with its pod listeners.
#[derive(Debug)]
pub struct OpenSandbox {
    /// The UID in the name of the pod's cgroup: for a static pod the config hash.
    pub pod: PodUid,
    /// The id of the pod's cgroup.
    pub cgroup: u64,
    /// The namespace's cookie.
    pub netns: u64,
    /// The port of all listeners, host order; 0 for none.
    pub port: u16,
    /// Non-blocking listeners at 127.0.0.1 and, where the namespace has IPv6, `::1`. They keep the namespace alive.
    pub sockets: Vec<TcpListener>,
}

/// A change of a pod's network namespace.
#[derive(Debug)]
pub enum Event {
    /// A namespace is known to be a pod's, or has new listeners.
    Opened(OpenSandbox),
    /// The namespace is no longer the pod's: its listeners are to be closed.
    Closed {
        /// As [`OpenSandbox::pod`].
        pod: PodUid,
        /// As [`OpenSandbox::netns`].
        netns: u64,
    },
}

/// The state of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The pod has a pod listener.
    Ready {
        /// The cookie of the pod's network namespace.
        netns: u64,
        /// The listener's port, host order.
        port: u16,
    },
    /// The pod's network namespace is known, but has no pod listener.
    Known {
        /// The namespace's cookie.
        netns: u64,
        /// Why there is no pod listener.
        reason: NoListenerReason,
    },
    /// The pod is being scanned.
    Waiting,
    /// The pod's network namespace is not known.
    Without(NoListenerReason),
}

/// Why a pod has no pod listener, or no known network namespace. All but the first may change: each event causes a scan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoListenerReason {
    /// The pod is on the node's network.
    #[error("the pod is on the node's network (hostNetwork)")]
    HostNetwork,
    /// The pod's cgroup is empty.
    #[error("no process of the pod runs yet")]
    NoProcess,
    /// The agent is in its own PID namespace.
    #[error("the agent can't see the pod's processes; run the agent with hostPID")]
    Hidden,
    /// Only the runtime's first processes run.
    #[error("the pod's processes are in the node's network namespace")]
    NodesNamespace,
    /// Another pod has claimed the namespace.
    #[error("the pod's network namespace belongs to pod {0}")]
    AnotherPods(PodUid),
    /// The namespace may be a nested one, or not this pod's.
    #[error("none of the pod's addresses is on an interface in its network namespace")]
    NoAddress,
    /// The loopback interface is down.
    #[error("lo is down in the pod's network namespace")]
    LoopbackDown,
    /// Pod listeners are off (`--path=node`).
    #[error("pods use the node listener (--path=node)")]
    NodePath,
    /// The pod uses all ports.
    #[error("no port outside ip_local_port_range is free in the pod's network namespace")]
    NoPort,
    /// The kernel has no `SO_NETNS_COOKIE`.
    #[error("this kernel can't distinguish network namespaces; kernel 5.14 can")]
    Kernel,
    /// A system call failed.
    #[error("{call}: {error}")]
    Failed {
        /// The system call.
        call: &'static str,
        /// The system's error.
        error: String,
    },
}

/// Why sandboxes can't be followed at all. Retrying does not help.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node's network namespace, or that of an inherited listener, can't be identified.
    #[error("network namespaces can't be distinguished ({0}); /proc and kernel 5.14 are needed")]
    Namespaces(#[source] io::Error),
    /// The thread or its runtime can't be created.
    #[error("the thread for pod listeners can't be started: {0}")]
    Thread(#[source] io::Error),
}

/// The number of descriptors for `pods` pods, for `RLIMIT_NOFILE`: two sockets and a namespace each, and those of scans.
#[must_use]
pub const fn descriptors(pods: usize) -> usize {
    // One more for inotify.
    3 * pods + 2 * SCANS_AT_ONCE * FILES_PER_SCAN + 1
}

// === impl State ===

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready { port, .. } => write!(f, "listening on port {port} inside the pod"),
            Self::Known { reason, .. } => write!(f, "{reason}"),
            Self::Waiting => f.write_str("being scanned"),
            Self::Without(reason) => write!(f, "{reason}"),
        }
    }
}

impl State {
    /// Every [`State::name`].
    pub(crate) const NAMES: [&'static str; 14] = [
        "ready",
        "known",
        "waiting",
        "host_network",
        "no_process",
        "hidden",
        "nodes_namespace",
        "another_pods",
        "no_address",
        "loopback_down",
        "node_path",
        "no_port",
        "kernel",
        "failed",
    ];

    /// The name in metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ready { .. } => "ready",
            Self::Known { .. } => "known",
            Self::Waiting => "waiting",
            Self::Without(NoListenerReason::HostNetwork) => "host_network",
            Self::Without(NoListenerReason::NoProcess) => "no_process",
            Self::Without(NoListenerReason::Hidden) => "hidden",
            Self::Without(NoListenerReason::NodesNamespace) => "nodes_namespace",
            Self::Without(NoListenerReason::AnotherPods(_)) => "another_pods",
            Self::Without(NoListenerReason::NoAddress) => "no_address",
            Self::Without(NoListenerReason::LoopbackDown) => "loopback_down",
            Self::Without(NoListenerReason::NodePath) => "node_path",
            Self::Without(NoListenerReason::NoPort) => "no_port",
            Self::Without(NoListenerReason::Kernel) => "kernel",
            Self::Without(NoListenerReason::Failed { .. }) => "failed",
        }
    }
}

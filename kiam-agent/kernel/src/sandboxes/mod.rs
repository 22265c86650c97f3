//! Follows the pods' sandboxes: from a pod's cgroup to its network namespace to listeners inside it.
//!
//! The one rule: a namespace is a pod's because the kernel shows a process of the pod's cgroup in it, because it is
//! neither the node's nor another pod's, and because it has one of the pod's addresses, once those are known. Nothing
//! that a container can name or make counts.

mod claims;
mod follow;
mod hurry;
mod listen;
mod look;
mod metrics;
mod processes;
mod reader;
mod sandbox;
mod unplaced;
mod watch;
mod watches;

use std::{fmt, io, net::TcpListener, time::Duration};

use crate::sys::Cgroup;
use kiam_core::{lifecycle::Latch, pods::PodUid};

pub use self::{
    follow::Sandboxes, hurry::hurried, metrics::Metrics, reader::SandboxReader, unplaced::Unplaced,
};

/// Namespaces of one pod that have listeners at most. One is normal, two while a sandbox is made anew.
const NAMESPACES: usize = 4;
/// Pods that are looked at together, hurried or not: as much as starts of pods in a row make use of on a small node.
const TOGETHER: usize = 4;
/// Descriptors of one look at most: processes' folders and namespaces, and what is opened.
const LOOK: usize = 2 * processes::CANDIDATES + 16;

/// What [`Sandboxes`] is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The pods' cgroup.
    pub cgroup: Cgroup,
    /// How often everything is looked at again, beside what is noticed at once.
    pub sweep: Duration,
    /// Whether to listen inside the namespaces: not where pods are served at the node's address alone.
    pub listens: bool,
    /// Set while every pod's cgroup is watched.
    pub watched: Latch,
}

/// A pod's network namespace, with the listeners inside it.
#[derive(Debug)]
pub struct Opened {
    /// As its cgroup is named: of a static pod this is the config hash.
    pub pod: PodUid,
    /// The id of that cgroup.
    pub cgroup: u64,
    /// The namespace's cookie.
    pub netns: u64,
    /// The port of all listeners, host order; 0: there are none.
    pub port: u16,
    /// Listening at 127.0.0.1 and, where the namespace has IPv6, `::1`; non-blocking. They keep the namespace alive.
    pub sockets: Vec<TcpListener>,
}

/// What becomes of pods' network namespaces.
#[derive(Debug)]
pub enum Event {
    /// One is known to be a pod's, or has got listeners.
    Opened(Opened),
    /// The pod is gone or lives elsewhere: the listeners are to be dropped.
    Closed {
        /// As [`Opened::pod`].
        pod: PodUid,
        /// As [`Opened::netns`].
        netns: u64,
    },
}

/// Where a pod stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It has listeners.
    Ready {
        /// The cookie of its network namespace.
        netns: u64,
        /// Their port, host order.
        port: u16,
    },
    /// Its network namespace is known, and there are no listeners inside it.
    Known {
        /// The namespace's cookie.
        netns: u64,
        /// Why not.
        reason: Reason,
    },
    /// It is being looked at.
    Waiting,
    /// Nothing of it is known.
    Without(Reason),
}

/// Why a pod has no listeners, or no network namespace that is known. All but the first may change; it is looked at again with every event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The API says so.
    #[error("the pod is on the node's network (hostNetwork)")]
    HostNetwork,
    /// The cgroup is empty.
    #[error("no process of the pod runs yet")]
    NoProcess,
    /// The agent is in a PID namespace of its own.
    #[error("the agent can't see the pod's processes; run it with hostPID")]
    Hidden,
    /// Only the runtime's own first steps were seen.
    #[error("the pod's processes are in the node's network namespace")]
    NodesNamespace,
    /// Two pods share one.
    #[error("the pod's network namespace is that of pod {0}")]
    AnotherPods(PodUid),
    /// It may be a nested one, or none of this pod's.
    #[error("none of the pod's addresses is on an interface in its network namespace")]
    NoAddress,
    /// Nothing can be bound there.
    #[error("lo is down in the pod's network namespace")]
    LoopbackDown,
    /// `--path=node`.
    #[error("pods are served at the node's address")]
    NodePath,
    /// The pod has them all.
    #[error("no port outside ip_local_port_range is free in the pod's network namespace")]
    NoPort,
    /// `SO_NETNS_COOKIE` is not there.
    #[error("this kernel does not tell network namespaces apart; kernel 5.14 does")]
    Kernel,
    /// The system refused.
    #[error("{call}: {error}")]
    Failed {
        /// What.
        call: &'static str,
        /// Why.
        error: String,
    },
}

/// Why sandboxes can't be followed at all. None of it mends itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node's own network namespace, or that of an inherited listener, can't be told.
    #[error("network namespaces can't be told apart ({0}); /proc and kernel 5.14 are needed")]
    Namespaces(#[source] io::Error),
    /// The system gave none, or no descriptors for it.
    #[error("no thread to be had: {0}")]
    Thread(#[source] io::Error),
}

/// Descriptors that `pods` pods take, for `RLIMIT_NOFILE`: two sockets and a namespace each, and what looks take.
#[must_use]
pub const fn descriptors(pods: usize) -> usize {
    // The watch is one more.
    3 * pods + 2 * TOGETHER * LOOK + 1
}

// === impl State ===

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready { port, .. } => write!(f, "listening on port {port} inside the pod"),
            Self::Known { reason, .. } => write!(f, "{reason}"),
            Self::Waiting => f.write_str("being looked at"),
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

    /// For metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ready { .. } => "ready",
            Self::Known { .. } => "known",
            Self::Waiting => "waiting",
            Self::Without(Reason::HostNetwork) => "host_network",
            Self::Without(Reason::NoProcess) => "no_process",
            Self::Without(Reason::Hidden) => "hidden",
            Self::Without(Reason::NodesNamespace) => "nodes_namespace",
            Self::Without(Reason::AnotherPods(_)) => "another_pods",
            Self::Without(Reason::NoAddress) => "no_address",
            Self::Without(Reason::LoopbackDown) => "loopback_down",
            Self::Without(Reason::NodePath) => "node_path",
            Self::Without(Reason::NoPort) => "no_port",
            Self::Without(Reason::Kernel) => "kernel",
            Self::Without(Reason::Failed { .. }) => "failed",
        }
    }
}

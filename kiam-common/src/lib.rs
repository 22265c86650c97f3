//! Shared by the kernel programs and the agent: addresses, verdicts and map layouts.
//!
//! All of it is plain values, so that the kernel's verdicts are tested on the host.
#![no_std]
#![deny(unsafe_code)]

pub mod client;
pub mod counters;
pub mod denial;
pub mod names;
pub mod redirect;

/// The version of the pinned maps' layout, and the name of their folder. It changes with the key or the value of a map. A
/// release with the same version takes over the pins of its predecessor.
pub const LAYOUT: u32 = 2;

/// How long a lease is valid after its renewal, in nanoseconds of `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`). The agent renews
/// it every second.
pub const LEASE_NS: u64 = 10_000_000_000;

/// The most open IMDS connections of one pod. The quota is not of network namespaces, which any user may create.
pub const POD_QUOTA: i64 = 256;
/// The most pods of one node with connections: four times the limit of kubelets on large nodes. Each connection has at
/// most two entries in `FLOWS`, which has room for all of them.
pub const PODS_PER_NODE: u32 = 1024;

/// The most connections whose processes are recorded for the audit: the quotas of 256 pods, as many as the largest nodes
/// run. So no pod can fill the map alone. Beyond that a connection's process stays unknown, and the connection is served.
pub const AUDITED_CONNECTIONS: u32 = 256 * POD_QUOTA as u32;

/// The value of `HOST_NETNS` if the agent does not know its own namespace's cookie. The programs then compare with that of
/// the initial namespace, which they can read since kernel 5.7. No namespace has this cookie: the kernel counts up from 1.
pub const HOST_NETNS_INITIAL: u64 = u64::MAX;

/// Which of the agent's listeners redirected connections go to; the value of `PATH`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerPath {
    /// To the pod listener if there is one, else to the node listener.
    Auto = 0,
    /// To the pod listener; denied without one. hostNetwork pods use the node listener, since their namespace is the node's.
    PodLocal = 1,
    /// To the node listener.
    Node = 2,
}

// === impl ListenerPath ===

impl ListenerPath {
    /// Whether this is the path that `PATH` has.
    #[inline(always)]
    #[must_use]
    pub const fn is(self, path: u32) -> bool {
        self as u32 == path
    }

    /// The value of `--path`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::PodLocal => "pod-local",
            Self::Node => "node",
        }
    }
}

/// The levels of the cgroup hierarchy that are searched for marks, from the root down.
pub const CGROUP_LEVELS: i32 = 12;

/// The mark of a cgroup; the value of `CGROUPS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupMark {
    /// None: there is no entry.
    Unmarked = 0,
    /// The connects of this subtree pass.
    Pass = 1,
    /// The connects of this subtree are intercepted, although an ancestor's pass.
    Intercept = 2,
    /// The pods' cgroup, to which the programs are attached.
    Pods = 3,
    /// The cgroup of a QoS class in the pods' cgroup. Guaranteed pods are in none.
    QosClass = 4,
}

// === impl CgroupMark ===

impl CgroupMark {
    /// Whether this is the mark that `CGROUPS` has.
    #[inline(always)]
    #[must_use]
    pub const fn is(self, mark: u32) -> bool {
        self as u32 == mark
    }
}

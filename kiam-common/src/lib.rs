//! What the kernel programs and the agent share: addresses, decisions, map layouts, names.
//!
//! Everything here is plain values, so the kernel's decisions are tested on the host.
#![no_std]
#![deny(unsafe_code)]

pub mod client;
pub mod counters;
pub mod redirect;

/// Number of the layout of the pinned maps: it names their folder, and changes when a map's key or
/// value does. A release that keeps it takes over the pins of the one before.
pub const LAYOUT: u32 = 2;

/// The lease counts as held for this long after it was renewed, in nanoseconds of `CLOCK_MONOTONIC`
/// (`bpf_ktime_get_ns`). The agent renews it every second.
pub const LEASE_NS: u64 = 10_000_000_000;

/// How many open IMDS connections one pod may hold; more are denied. Not a network namespace: any user may make many
/// of them.
pub const POD_QUOTA: i64 = 256;
/// Pods of one node that may hold connections at once: four times as many as the kubelets of large nodes run. Each
/// connection has two entries at most in [`client::FlowKey`]'s map, which has room for all of them: it never fills.
pub const PODS_PER_NODE: u32 = 1024;

/// `HOST_NETNS` of an agent that has not learned its own namespace's cookie: the programs compare with the initial
/// namespace's, which they can ask for since kernel 5.7.
/// No namespace has this cookie: the kernel counts them up from 1.
pub const HOST_NETNS_INITIAL: u64 = u64::MAX;

/// `PATH`: to the listener inside the caller's network namespace where there is one, else to the node's.
pub const PATH_AUTO: u32 = 0;
/// `PATH`: to the listener inside the caller's network namespace; without one, denied.
pub const PATH_POD_LOCAL: u32 = 1;
/// `PATH`: to the node's listener.
pub const PATH_NODE: u32 = 2;

/// Levels of the cgroup path that are asked for an exemption, from the attached cgroup's top down.
pub const CGROUP_LEVELS: i32 = 12;

/// What stands for no mark where a mark is asked for: no entry of `CGROUPS` has it.
pub const CGROUP_UNMARKED: u32 = 0;
/// `CGROUPS` value: this subtree's connects are left alone.
pub const CGROUP_PASS: u32 = 1;
/// `CGROUPS` value: this subtree's connects are intercepted, though an ancestor's pass.
pub const CGROUP_INTERCEPT: u32 = 2;
/// `CGROUPS` value: the pods' cgroup itself, where the programs are attached.
pub const CGROUP_PODS: u32 = 3;
/// `CGROUPS` value: a QoS class's cgroup, which holds pods too, in the pods' cgroup. Guaranteed pods are in none.
pub const CGROUP_QOS_CLASS: u32 = 4;

//! The maps, and the constants that the agent writes into the programs before it loads them.
//!
//! What configures the programs is constant: a restart replaces the programs whole, so that no connect
//! ever sees half of a change. The maps are pinned and outlive the agent.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use kiam_common::{
    POD_QUOTA, PODS_PER_NODE,
    client::{ClientRecord, ConnectionCount, FlowKey, Opener, Sandbox, Sighting, Sightings},
    counters::VerdictReason,
    redirect::{AgentPorts, Target},
};

/// Where redirected connections go.
#[unsafe(no_mangle)]
pub(crate) static TARGET: Global<Target> =
    Global::new(Target { v4: [0; 4], v6: [0; 16], v4_port: 0, v6_port: 0 });

/// The agent's ports on the node.
#[unsafe(no_mangle)]
pub(crate) static AGENT_PORTS: Global<AgentPorts> = Global::new([0; 4]);

/// The node's own network namespace cookie, or `HOST_NETNS_INITIAL`.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u64> = Global::new(0);

/// Not 0: sockets of the node's network namespace pass (`--host-network-pods=pass`).
#[unsafe(no_mangle)]
pub(crate) static HOST_NETWORK_PASSES: Global<u32> = Global::new(0);

/// `PATH_AUTO`, `PATH_POD_LOCAL` or `PATH_NODE`.
#[unsafe(no_mangle)]
pub(crate) static PATH: Global<u32> = Global::new(0);

/// Not 0: a connect is redirected only from a network namespace that is known to be the caller's pod's
/// (`--identity=kernel`, where the kernel tells namespaces apart).
#[unsafe(no_mangle)]
pub(crate) static NAMESPACES_ARE_KNOWN: Global<u32> = Global::new(0);

/// Not 0: nothing is changed, only counted (`--mode=observe`).
#[unsafe(no_mangle)]
pub(crate) static OBSERVES: Global<u32> = Global::new(0);

/// The cookie of the agent's socket whose network namespace `kiam_namespace` notes; 0, which no socket has: of none.
#[unsafe(no_mangle)]
pub(crate) static PROBE_SOCKET: Global<u64> = Global::new(0);

/// What `kiam_namespace` noted; 0, which no namespace has: nothing yet. Not pinned.
#[map]
pub(crate) static PROBE_NETNS: Array<u64> = Array::with_max_entries(1, 0);

/// When the agent last renewed its lease, `CLOCK_MONOTONIC` nanoseconds; 0: never.
#[map]
pub(crate) static LEASE: Array<u64> = Array::with_max_entries(1, 0);

/// Cgroup id to `CGROUP_PASS`, `CGROUP_INTERCEPT`, `CGROUP_PODS` or `CGROUP_QOS_CLASS`.
#[map]
pub(crate) static CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(64, 0);

/// Who connected, kept with the socket: nobody else's sockets can push it out.
#[btf_map]
pub(crate) static CLIENTS: SkStorage<ClientRecord> = SkStorage::new();

/// Sockets that the agent listens with: connect goes to no others. Written by the agent.
#[btf_map]
pub(crate) static LISTENERS: SkStorage<u32> = SkStorage::new();

/// The network namespaces that are known to be pods', each with the agent's listeners inside it. Written by the agent.
#[map]
pub(crate) static SANDBOXES: HashMap<u64, Sandbox> =
    HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// Sockets that connect or sendmsg let through to the IMDS.
#[btf_map]
pub(crate) static PASSED: SkStorage<u32> = SkStorage::new();

/// Open connections by what both ends see of them, each under its opener's network namespace and, for the filter of
/// SYNs at the node's listener, which can't see that, under namespace 0. It evicts nothing, and has room for the quotas
/// of all pods that `PODS` has room for.
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Opener> =
    HashMap::with_max_entries(PODS_PER_NODE * POD_QUOTA as u32 * 2, BPF_F_NO_PREALLOC);

/// Who asked for the IMDS, and how often (`--mode=observe`).
#[map]
pub(crate) static OBSERVED: LruHashMap<Sighting, Sightings> = LruHashMap::with_max_entries(8192, 0);

/// Open connections by pod. Where it is full, further pods are denied.
#[map]
pub(crate) static PODS: HashMap<u64, ConnectionCount> =
    HashMap::with_max_entries(PODS_PER_NODE, BPF_F_NO_PREALLOC);

/// When each link was attached, by its id: `CLOCK_BOOTTIME` nanoseconds. For agents alone.
#[map]
pub(crate) static ATTACHED: HashMap<u32, u64> = HashMap::with_max_entries(64, 0);

/// How often each `VerdictReason` was the answer.
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(VerdictReason::ROOM, 0);

/// Counts one.
#[inline(always)]
pub(crate) fn count(reason: VerdictReason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU value that the map returned, and no program interrupts this one on its CPU.
        unsafe { *counter += 1 }
    }
}

//! The maps, and the constants that the agent writes into the programs before it loads them.
//!
//! The configuration is constant: a restart replaces the programs as a whole, so that no connect sees half of a change. The
//! maps are pinned and outlive the agent.

use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray},
};
use kiam_common::{
    AUDITED_CONNECTIONS, POD_QUOTA, PODS_PER_NODE,
    client::{
        CallingProcess, ClientRecord, ConnectionCount, FlowKey, Opener, Sandbox, Sighting,
        Sightings,
    },
    counters::VerdictReason,
    redirect::{AgentPorts, Target},
};

/// The node listeners for redirected connections.
#[unsafe(no_mangle)]
pub(crate) static TARGET: Global<Target> =
    Global::new(Target { v4: [0; 4], v6: [0; 16], v4_port: 0, v6_port: 0 });

/// The agent's ports on the node.
#[unsafe(no_mangle)]
pub(crate) static AGENT_PORTS: Global<AgentPorts> = Global::new([0; 4]);

/// The node's own network namespace cookie, or `HOST_NETNS_INITIAL`.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u64> = Global::new(0);

/// Whether sockets of the node's network namespace pass (`--host-network-pods=pass`): 1, else 0.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETWORK_PASSES: Global<u32> = Global::new(0);

/// A `ListenerPath`.
#[unsafe(no_mangle)]
pub(crate) static PATH: Global<u32> = Global::new(0);

/// Whether connects are redirected only from network namespaces that are known to be the caller's pod's
/// (`--identity=kernel`, on kernels with namespace cookies): 1, else 0.
#[unsafe(no_mangle)]
pub(crate) static NAMESPACES_ARE_KNOWN: Global<u32> = Global::new(0);

/// Whether connects are only counted (`--mode=observe`): 1, else 0.
#[unsafe(no_mangle)]
pub(crate) static OBSERVES: Global<u32> = Global::new(0);

/// The cookie of the agent's socket whose network namespace `kiam_namespace` records; 0, which no socket has: none.
#[unsafe(no_mangle)]
pub(crate) static PROBE_SOCKET: Global<u64> = Global::new(0);

/// The cookie that `kiam_namespace` recorded; 0, which no namespace has: none yet. Not pinned.
#[map]
pub(crate) static PROBE_NETNS: Array<u64> = Array::with_max_entries(1, 0);

/// The time of the lease's last renewal, in nanoseconds of `CLOCK_MONOTONIC`; 0: never.
#[map]
pub(crate) static LEASE: Array<u64> = Array::with_max_entries(1, 0);

/// The `CgroupMark`s of cgroups by id.
#[map]
pub(crate) static CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(64, 0);

/// The records of redirected sockets, stored with the sockets, so that other sockets can't evict them.
#[btf_map]
pub(crate) static CLIENTS: SkStorage<ClientRecord> = SkStorage::new();

/// The processes that called connect, stored with the sockets as [`CLIENTS`] is.
#[btf_map]
pub(crate) static CALLERS: SkStorage<CallingProcess> = SkStorage::new();

/// The agent's listeners, to which alone connects are redirected. Written by the agent.
#[btf_map]
pub(crate) static LISTENERS: SkStorage<u32> = SkStorage::new();

/// The network namespaces that are known to be pods', with their pod listeners. Written by the agent.
#[map]
pub(crate) static SANDBOXES: HashMap<u64, Sandbox> =
    HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// The sockets whose connect or sendmsg to the IMDS passed.
#[btf_map]
pub(crate) static PASSED: SkStorage<u32> = SkStorage::new();

/// The openers of connections, each under its own network namespace and, for the node listener's filter of SYNs, which
/// can't see that, under namespace 0. Nothing is evicted: there is room for the quotas of all pods in `PODS`.
#[map]
pub(crate) static FLOWS: HashMap<FlowKey, Opener> =
    HashMap::with_max_entries(PODS_PER_NODE * POD_QUOTA as u32 * 2, BPF_F_NO_PREALLOC);

/// The processes that opened established connections, by the socket's cookie, for the audit. Nothing is evicted.
#[map]
pub(crate) static PROCESSES: HashMap<u64, CallingProcess> =
    HashMap::with_max_entries(AUDITED_CONNECTIONS, BPF_F_NO_PREALLOC);

/// The callers of the IMDS, with counts (`--mode=observe`).
#[map]
pub(crate) static OBSERVED: LruHashMap<Sighting, Sightings> = LruHashMap::with_max_entries(8192, 0);

/// The connection counts of pods. When it is full, further pods are denied.
#[map]
pub(crate) static PODS: HashMap<u64, ConnectionCount> =
    HashMap::with_max_entries(PODS_PER_NODE, BPF_F_NO_PREALLOC);

/// Since when each link intercepts, by its id, and by its complement since when routing rules did so before:
/// `CLOCK_BOOTTIME` nanoseconds. For agents alone.
#[map]
pub(crate) static ATTACHED: HashMap<u32, u64> = HashMap::with_max_entries(64, 0);

/// The counters of each `VerdictReason`.
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(VerdictReason::ROOM, 0);

/// Counts one verdict.
#[inline(always)]
pub(crate) fn count(reason: VerdictReason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU value that the map returned, and no program interrupts this one on its CPU.
        unsafe { *counter += 1 }
    }
}

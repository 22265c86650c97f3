//! The properties of callers: their cgroups' marks, their pods, and the agent's lease.

use aya_ebpf::{
    helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_ktime_get_ns},
    programs::SockAddrContext,
};
use kiam_common::{CGROUP_LEVELS, CgroupMark, LEASE_NS, redirect::Caller};

use crate::{
    maps::{CGROUPS, HOST_NETWORK_PASSES, LEASE},
    sock_addr::{is_on_host_network, is_stream},
};

#[inline(always)]
pub(crate) fn caller(ctx: &SockAddrContext) -> Caller {
    Caller { exempt: is_exempt(ctx), leased: is_leased(), stream: is_stream(ctx) }
}

/// Whether the caller is exempt: the nearest marked cgroup decides, else `--host-network-pods` for the node's network.
#[inline(always)]
fn is_exempt(ctx: &SockAddrContext) -> bool {
    let mark = mark();
    if CgroupMark::Pass.is(mark) {
        return true;
    }
    if CgroupMark::Intercept.is(mark) {
        return false;
    }
    HOST_NETWORK_PASSES.load() != 0 && is_on_host_network(ctx)
}

/// Whether the calling process is in the agent's own pod.
#[inline(always)]
pub(crate) fn is_agent() -> bool {
    CgroupMark::Pass.is(mark())
}

/// Whether the calling process is the self-test, which alone has this mark.
#[inline(always)]
pub(crate) fn is_selftest() -> bool {
    CgroupMark::Intercept.is(mark())
}

/// The mark of the nearest marked cgroup, from the caller's own upwards; [`CgroupMark::Unmarked`] without one.
#[inline(always)]
fn mark() -> u32 {
    // SAFETY: the helper has no preconditions (kernel 4.18).
    let mut nearest = mark_of(unsafe { bpf_get_current_cgroup_id() });
    if CgroupMark::Unmarked.is(nearest) {
        // From the root down, so the last one found is the nearest.
        for level in 1..=CGROUP_LEVELS {
            let above = ancestor(level);
            if above == 0 {
                break;
            }
            let mark = mark_of(above);
            if !CgroupMark::Unmarked.is(mark) {
                nearest = mark;
            }
        }
    }
    nearest
}

/// The mark of one cgroup; [`CgroupMark::Unmarked`] without one.
///
/// Not an `Option<u32>`: if the option lives across a helper call, LLVM spills the uninitialized payload of a `None`, and
/// kernels before 6.3 reject the program ("invalid read from stack"). Only plain values live across calls here.
#[inline(always)]
pub(crate) fn mark_of(cgroup: u64) -> u32 {
    // SAFETY: the entry is not freed while the program runs (RCU).
    match unsafe { CGROUPS.get(cgroup) } {
        Some(mark) => *mark,
        None => CgroupMark::Unmarked as u32,
    }
}

/// The cgroup of the caller's pod: the child of the pods' cgroup or of a QoS class's. The kubelet creates these; cgroups
/// of containers are deeper. All pods of a class that the agent has not marked yet count as one.
#[inline(always)]
pub(crate) fn pod() -> u64 {
    let mut holds_pods = 0;
    for level in 1..=CGROUP_LEVELS {
        let above = ancestor(level);
        if above == 0 {
            break;
        }
        let mark = mark_of(above);
        if CgroupMark::Pods.is(mark) || CgroupMark::QosClass.is(mark) {
            // From the root down, so the last one found is the nearest.
            holds_pods = level;
        }
    }
    match ancestor(holds_pods + 1) {
        // SAFETY: the helper has no preconditions (kernel 4.18).
        0 => unsafe { bpf_get_current_cgroup_id() },
        pod => pod,
    }
}

/// Whether the calling process is in `cgroup`, or below it.
#[inline(always)]
pub(crate) fn is_in(cgroup: u64) -> bool {
    for level in 1..=CGROUP_LEVELS {
        let above = ancestor(level);
        if above == 0 {
            break;
        }
        if above == cgroup {
            return true;
        }
    }
    false
}

/// The caller's cgroup or its ancestor at `level`; 0 below its own level.
#[inline(always)]
fn ancestor(level: i32) -> u64 {
    // SAFETY: the helper has no preconditions (kernel 5.6).
    unsafe { bpf_get_current_ancestor_cgroup_id(level) }
}

#[inline(always)]
fn is_leased() -> bool {
    let Some(renewed) = LEASE.get(0) else { return false };
    // Read once, and before the time: a renewal in between would be later than now.
    // SAFETY: a value that the map returned; an aligned word is read whole.
    let renewed = unsafe { core::ptr::from_ref(renewed).read_volatile() };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    renewed != 0 && now.saturating_sub(renewed) < LEASE_NS
}

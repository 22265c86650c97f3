//! What is known of a caller besides where it wants to go.

use aya_ebpf::{
    helpers::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_ktime_get_ns},
    programs::SockAddrContext,
};
use kiam_common::{
    CGROUP_INTERCEPT, CGROUP_LEVELS, CGROUP_PASS, CGROUP_PODS, CGROUP_QOS_CLASS, LEASE_NS,
    redirect::Caller,
};

use crate::{
    maps::{CGROUPS, HOST_NETWORK_PASSES, LEASE},
    sock_addr::{is_on_host_network, is_stream},
};

#[inline(always)]
pub(crate) fn caller(ctx: &SockAddrContext) -> Caller {
    Caller { exempt: is_exempt(ctx), leased: is_leased(), stream: is_stream(ctx) }
}

/// The nearest cgroup that is marked decides; a hostNetwork pod passes where the operator says so.
#[inline(always)]
fn is_exempt(ctx: &SockAddrContext) -> bool {
    match mark() {
        Some(CGROUP_PASS) => true,
        Some(CGROUP_INTERCEPT) => false,
        _ => HOST_NETWORK_PASSES.load() != 0 && is_on_host_network(ctx),
    }
}

/// Whether the calling process is of the agent's own pod.
#[inline(always)]
pub(crate) fn is_agent() -> bool {
    mark() == Some(CGROUP_PASS)
}

/// Whether the calling process is the agent's proof of itself: nothing else is marked so.
#[inline(always)]
pub(crate) fn is_proof() -> bool {
    mark() == Some(CGROUP_INTERCEPT)
}

/// The mark of the nearest cgroup, of the caller's and those above it, that has one.
#[inline(always)]
fn mark() -> Option<u32> {
    // SAFETY: the helper has no preconditions (kernel 4.18).
    let own = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the entry is not freed while the program runs (RCU).
    let mut nearest = unsafe { CGROUPS.get(own) }.copied();
    if nearest.is_none() {
        // From the root down, so the last one found is the nearest.
        for level in 1..=CGROUP_LEVELS {
            let above = ancestor(level);
            if above == 0 {
                break;
            }
            // SAFETY: as above.
            if let Some(mark) = unsafe { CGROUPS.get(above) } {
                nearest = Some(*mark);
            }
        }
    }
    nearest
}

/// The caller's pod: the child of the pods' cgroup or, where that is a QoS class, the child of the class. The kubelet
/// makes these; what a container makes is deeper. All pods of a class that the agent has not marked yet are one.
#[inline(always)]
pub(crate) fn pod() -> u64 {
    let mut holds_pods = 0;
    for level in 1..=CGROUP_LEVELS {
        let above = ancestor(level);
        if above == 0 {
            break;
        }
        // SAFETY: the entry is not freed while the program runs (RCU).
        if let Some(&(CGROUP_PODS | CGROUP_QOS_CLASS)) = unsafe { CGROUPS.get(above) } {
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

/// The cgroup at `level` that the calling process is in; 0 beyond its own.
#[inline(always)]
fn ancestor(level: i32) -> u64 {
    // SAFETY: the helper has no preconditions (kernel 5.6).
    unsafe { bpf_get_current_ancestor_cgroup_id(level) }
}

#[inline(always)]
fn is_leased() -> bool {
    let Some(renewed) = LEASE.get(0) else { return false };
    // Once, and before the time: a renewal in between would be later than now.
    // SAFETY: a value that the map returned; an aligned word is read whole.
    let renewed = unsafe { core::ptr::from_ref(renewed).read_volatile() };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    renewed != 0 && now.saturating_sub(renewed) < LEASE_NS
}

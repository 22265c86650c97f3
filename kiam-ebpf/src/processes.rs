//! Records, for the audit, which processes open connections. Who they are decides nothing. But a socket that has no room for
//! the record does not connect: a process can use up its socket's memory, and would stay unknown to the audit. Where the map
//! of established connections is full, which other pods may have filled, the connection is served.

use aya_ebpf::{
    helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns, generated::bpf_get_current_comm},
    programs::{SockAddrContext, SockOpsContext},
};
use kiam_common::client::CallingProcess;

use crate::{
    flows::stored,
    maps::{CALLERS, PROCESSES},
};

/// Records the calling process with the socket, in place of an earlier connect's. `false` if the socket has no room for it.
#[inline(always)]
#[must_use]
pub(crate) fn record(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context's socket is the one that is being connected.
    let caller = unsafe { CALLERS.get_or_insert_ptr_mut(ctx, None) };
    if caller.is_null() {
        return false;
    }
    // SAFETY: not null, and owned by this socket, which the caller of connect has locked.
    let caller = unsafe { &mut *caller };
    // For hooks of socket addresses since kernel 5.7.
    let ids = bpf_get_current_pid_tgid();
    caller.process = (ids >> 32) as u32;
    caller.thread = ids as u32;
    // SAFETY: the helper has no preconditions (kernel 5.8).
    caller.connected_ns = unsafe { bpf_ktime_get_boot_ns() };
    let size = caller.comm.len() as u32;
    // SAFETY: the helper writes `size` bytes, all of the array, also when it fails (kernel 5.7 for these hooks).
    let _ = unsafe { bpf_get_current_comm(caller.comm.as_mut_ptr().cast(), size) };
    true
}

/// Publishes the recorded process of an established connection, for the agent.
#[inline(always)]
pub(crate) fn publish(ctx: &SockOpsContext, socket: u64) {
    let caller = stored(ctx, (&raw const CALLERS).cast_mut().cast());
    // SAFETY: null, or this socket's own record.
    if let Some(caller) = unsafe { caller.cast::<CallingProcess>().as_ref() } {
        let _ = PROCESSES.insert(socket, caller, 0);
    }
}

/// Removes the entry of a socket that closes.
#[inline(always)]
pub(crate) fn remove(socket: u64) {
    let _ = PROCESSES.remove(socket);
}

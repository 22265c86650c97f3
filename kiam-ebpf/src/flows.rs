//! Records redirected connections for the agent's lookups.
//!
//! connect records the caller with the socket. `BPF_SOCK_OPS_TCP_CONNECT_CB`, which runs once the source port is chosen
//! and before the SYN is sent, counts the connection and admits the SYN. `BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB`, which runs
//! before the listener accepts the connection, publishes the opener. The socket's close removes the entry.
//!
//! Several sockets can connect with the same addresses and ports at once: a socket may be bound to an interface after its
//! port was chosen, and TCP Fast Open lets it send its SYN at any time. But only the socket that gets the answer
//! establishes the connection, and only its opener is published.

use core::{arch::asm, ffi::c_void, ptr::null_mut};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_NOEXIST, BPF_SOCK_OPS_STATE_CB_FLAG},
    helpers::{
        bpf_get_current_cgroup_id, bpf_ktime_get_ns,
        generated::{bpf_get_socket_cookie, bpf_sk_storage_get},
    },
    programs::{SockAddrContext, SockOpsContext},
};
use kiam_common::{
    client::{ClientRecord, ConnectionCount, FlowKey, Opener, Sighting, Sightings, mapped},
    counters::VerdictReason,
    denial::quota_denial,
    redirect::{Destination, Verdict},
};

use crate::{
    maps::{CLIENTS, FLOWS, OBSERVED, PODS, count},
    processes,
    sock_addr::netns,
};

const AF_INET: u32 = 2;

/// A connect that is redirected.
#[derive(Clone, Copy)]
pub(crate) struct Redirection {
    /// The cgroup of the pod whose quota has the connection.
    pub(crate) pod: u64,
    /// The original destination, IPv4 as v4-mapped.
    pub(crate) asked: [u8; 16],
    pub(crate) destination: Destination,
    /// Whether the listener is a pod listener.
    pub(crate) pod_listener: bool,
    /// Whether the caller is in the node's network namespace.
    pub(crate) on_host: bool,
}

/// Records the caller with the socket, unless its pod has too many connections.
#[inline(always)]
pub(crate) fn record(ctx: &SockAddrContext, redirection: Redirection) -> Result<(), VerdictReason> {
    let counts = counts_of(redirection.pod).ok_or(VerdictReason::Full)?;
    if let Some(reason) = quota_denial(open_now(counts)) {
        return Err(reason);
    }
    let netns = netns(ctx);
    if !has_room(netns, redirection.pod_listener) {
        return Err(VerdictReason::Full);
    }
    // SAFETY: the context's socket is the one that is being connected.
    let client = unsafe { CLIENTS.get_or_insert_ptr_mut(ctx, None) };
    if client.is_null() {
        return Err(VerdictReason::NoRecord);
    }
    // SAFETY: not null, and owned by this socket, which the caller of connect has locked.
    let client = unsafe { &mut *client };
    // A connected socket can't connect again. Otherwise its entry would never be removed.
    if client.state == ClientRecord::BEGUN || client.state == ClientRecord::PUBLISHED {
        return Err(VerdictReason::NoRecord);
    }
    client.opener = Opener {
        // SAFETY: the helper has no preconditions (kernel 4.18).
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        netns,
        // SAFETY: the helper takes the program's own context (kernel 4.19).
        socket: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        on_host: redirection.on_host.into(),
        pad: 0,
    };
    client.pod = redirection.pod;
    client.asked = redirection.asked;
    client.destination = match redirection.destination {
        Destination::V4(address, _) => mapped(address.octets()),
        Destination::V6(address, _) => address.octets(),
    };
    client.port = redirection.destination.port();
    client.pod_listener = redirection.pod_listener.into();
    if !processes::record(ctx) {
        return Err(VerdictReason::NoRecord);
    }
    client.state = ClientRecord::RECORDED;
    Ok(())
}

/// Whether `FLOWS` has room for another connection's entries: one for a pod listener, two for a node listener. They are
/// written when the connect can't be denied any more, and would wait in vain for an answer to its SYN.
#[inline(always)]
fn has_room(netns: u64, pod_listener: bool) -> bool {
    // No connection has these ends.
    let nobodys = FlowKey {
        netns,
        source: [0; 16],
        destination: [0; 16],
        source_port_be: 0,
        destination_port_be: 0,
        pad: 0,
    };
    let another = FlowKey { netns: 0, ..nobodys };
    let nobody = Opener { cgroup: 0, netns, socket: 0, on_host: 0, pad: 0 };
    if FLOWS.insert(nobodys, nobody, 0).is_err() {
        return false;
    }
    let mut room = true;
    if !pod_listener {
        room = FLOWS.insert(another, nobody, 0).is_ok();
        if room {
            let _ = FLOWS.remove(another);
        }
    }
    let _ = FLOWS.remove(nobodys);
    room
}

/// The record of a redirected socket.
#[inline(always)]
#[expect(
    clippy::mut_from_ref,
    reason = "the record is the socket's, which the callback has locked"
)]
fn recorded(ctx: &SockOpsContext) -> Option<&mut ClientRecord> {
    let client = stored(ctx, (&raw const CLIENTS).cast_mut().cast());
    // SAFETY: null, or this socket's own record.
    unsafe { client.cast::<ClientRecord>().as_mut() }
}

/// What `map`, a socket storage, has for the callback's socket; null for nothing.
#[inline(always)]
pub(crate) fn stored(ctx: &SockOpsContext, map: *mut c_void) -> *mut c_void {
    // SAFETY: the context is there for as long as the program runs.
    let union = unsafe { (*ctx.ops).__bindgen_anon_2 };
    // SAFETY: the union has this one field, which the verifier checks.
    let socket = unsafe { union.sk };
    if socket.is_null() {
        return null_mut();
    }
    // SAFETY: aya's own accessor takes only a sock_addr context; the map and the socket are real (kernel 5.2).
    unsafe { bpf_sk_storage_get(map, socket.cast(), null_mut(), 0) }
}

/// The connection's key, with the addresses and ports that the agent's accept returns.
#[inline(always)]
fn key(ctx: &SockOpsContext, netns: u64) -> FlowKey {
    // SAFETY: the context outlives the program's run.
    let ops = unsafe { &*ctx.ops };
    let local = Words::read(&raw const ops.local_ip4, &raw const ops.local_ip6);
    let remote = Words::read(&raw const ops.remote_ip4, &raw const ops.remote_ip6);
    let v4 = ctx.family() == AF_INET;
    FlowKey {
        netns,
        source: local.address(v4),
        destination: remote.address(v4),
        source_port_be: (ctx.local_port() as u16).to_be(),
        destination_port_be: remote_port(ctx).to_be(),
        pad: 0,
    }
}

/// The remote port in host order. The context has it in network order, in the upper half on little-endian machines.
#[inline(always)]
fn remote_port(ctx: &SockOpsContext) -> u16 {
    u32::from_be(ctx.remote_port()) as u16
}

/// Both forms of an address in the context.
struct Words {
    v4: u32,
    v6: [u32; 4],
}

impl Words {
    /// Reads both forms. If only one were read, LLVM would compute the pointer first, which the verifier rejects for a
    /// context ("dereference of modified ctx ptr").
    #[inline(always)]
    fn read(v4: *const u32, v6: *const [u32; 4]) -> Self {
        let v6 = v6.cast::<u32>();
        Self {
            // SAFETY: a field of the context, which the verifier checks.
            v4: unsafe { v4.read_volatile() },
            v6: [
                // SAFETY: as above.
                unsafe { v6.read_volatile() },
                // SAFETY: as above, within the field's four words.
                unsafe { v6.wrapping_add(1).read_volatile() },
                // SAFETY: as above.
                unsafe { v6.wrapping_add(2).read_volatile() },
                // SAFETY: as above.
                unsafe { v6.wrapping_add(3).read_volatile() },
            ],
        }
    }

    /// The address in network order, as the words are, IPv4 as v4-mapped.
    #[inline(always)]
    fn address(&self, v4: bool) -> [u8; 16] {
        if v4 {
            return mapped(self.v4.to_ne_bytes());
        }
        let [a, b, c, d] = self.v6.map(u32::to_ne_bytes);
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }
}

/// Counts a recorded connection, and admits its SYN.
#[inline(always)]
pub(crate) fn begin(ctx: &SockOpsContext) {
    let Some(client) = recorded(ctx) else { return };
    if client.state != ClientRecord::RECORDED {
        return;
    }
    // In any case: later connects of the socket need a verdict, and count, again.
    client.state = ClientRecord::USED;
    let key = key(ctx, client.opener.netns);
    // Not compared with this program's target: during a handover, the connect programs may still have the other agent's.
    if remote_port(ctx) != client.port || key.destination != client.destination {
        return;
    }
    if ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32).is_err() {
        return count(VerdictReason::Full);
    }
    if let Err(reason) = enter(client, key) {
        // The connection stays unattested: its SYN is dropped, or its request rejected.
        return count(reason);
    }
    client.key = key;
    client.state = ClientRecord::BEGUN;
}

/// Counts the connection in its pod's quota, and admits its SYN: both, or neither.
#[inline(always)]
fn enter(client: &ClientRecord, key: FlowKey) -> Result<(), VerdictReason> {
    let counts = counts_of(client.pod).ok_or(VerdictReason::Full)?;
    open(counts);
    // The connect hook has checked the quota, but other sockets may have connected since.
    let result = if let Some(reason) = quota_denial(open_now(counts) - 1) {
        Err(reason)
    } else if client.pod_listener != 0 {
        Ok(())
    } else {
        admit(client, key)
    };
    if result.is_err() {
        closed(counts);
    }
    result
}

/// Writes the entry by which the node listener's filter, which does not see the namespace, admits the SYN. Any opener's
/// entry will do, so that the entry of an established connection is not overwritten.
#[inline(always)]
fn admit(client: &ClientRecord, key: FlowKey) -> Result<(), VerdictReason> {
    let key = FlowKey { netns: 0, ..key };
    // SAFETY: only the entry's presence is used.
    if unsafe { FLOWS.get(key) }.is_some() {
        return Ok(());
    }
    FLOWS.insert(key, client.opener, 0).map_err(|_| VerdictReason::Full)
}

/// Publishes the opener of an established connection, in place of earlier entries with the same addresses and ports.
#[inline(always)]
pub(crate) fn publish(ctx: &SockOpsContext) {
    let Some(client) = recorded(ctx) else { return };
    if client.state != ClientRecord::BEGUN {
        return;
    }
    let (key, opener) = (client.key, client.opener);
    let last = FlowKey { netns: 0, ..key };
    if FLOWS.insert(key, opener, 0).is_err()
        || (client.pod_listener == 0 && FLOWS.insert(last, opener, 0).is_err())
    {
        // No half entry stays. The close removes the rest, and until then its requests are rejected.
        remove(key, opener.socket);
        return count(VerdictReason::Full);
    }
    client.state = ClientRecord::PUBLISHED;
    processes::publish(ctx, opener.socket);
}

/// Removes the connection's entries, if they are still this socket's, and its part of the quota.
#[inline(always)]
pub(crate) fn close(ctx: &SockOpsContext) {
    let Some(client) = recorded(ctx) else { return };
    if client.state != ClientRecord::BEGUN && client.state != ClientRecord::PUBLISHED {
        return;
    }
    client.state = ClientRecord::USED;
    let (key, socket) = (client.key, client.opener.socket);
    remove(key, socket);
    processes::remove(socket);
    if client.pod_listener == 0 {
        remove(FlowKey { netns: 0, ..key }, socket);
    }
    if let Some(counts) = PODS.get_ptr_mut(client.pod) {
        closed(counts);
    }
}

/// Removes an entry, if it is `socket`'s.
#[inline(always)]
fn remove(key: FlowKey, socket: u64) {
    // SAFETY: the entry is not freed while the program runs (RCU).
    if let Some(entry) = unsafe { FLOWS.get(key) }
        && entry.socket == socket
    {
        let _ = FLOWS.remove(key);
    }
}

/// Counts the verdict that a connect or a datagram would have got.
#[inline(always)]
pub(crate) fn observe(verdict: Verdict) {
    let reason = match verdict {
        Verdict::Pass(VerdictReason::Unrelated) => return,
        Verdict::Pass(reason) | Verdict::Deny(reason) => reason,
        Verdict::Redirect(_) => VerdictReason::Redirected,
    };
    // SAFETY: the helper has no preconditions (kernel 4.18).
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let key = Sighting { cgroup, reason: reason as u32, pad: 0 };
    match OBSERVED.get_ptr_mut(key) {
        Some(seen) => {
            // SAFETY: a value that the map returned lives as long as the program runs (RCU).
            let seen = unsafe { &mut *seen };
            seen.count += 1;
            seen.last_ns = now;
        }
        None => {
            let _ = OBSERVED.insert(key, Sightings { count: 1, last_ns: now }, 0);
        }
    }
    count(VerdictReason::Observed);
}

/// The connection counts of `pod`; `None` if the map has no room for another pod.
#[inline(always)]
fn counts_of(pod: u64) -> Option<*mut ConnectionCount> {
    let counts = PODS.get_ptr_mut(pod);
    if counts.is_some() {
        return counts;
    }
    // Another processor may insert first. An insertion on each call would be expensive.
    let _ = PODS.insert(pod, ConnectionCount { open: 0, opened: 0 }, BPF_NOEXIST.into());
    PODS.get_ptr_mut(pod)
}

/// The open connections.
#[inline(always)]
fn open_now(counts: *mut ConnectionCount) -> i64 {
    // SAFETY: a value that the map returned lives as long as the program runs (RCU).
    let open = unsafe { &raw const (*counts).open };
    // SAFETY: as above, and an aligned word is read whole.
    unsafe { open.read_volatile() }
}

/// Counts an opened connection.
#[inline(always)]
fn open(counts: *mut ConnectionCount) {
    // SAFETY: a value that the map returned lives as long as the program runs (RCU).
    add(unsafe { &raw mut (*counts).open }, 1);
    // SAFETY: as above.
    add(unsafe { &raw mut (*counts).opened }, 1);
}

/// Counts a closed connection.
#[inline(always)]
fn closed(counts: *mut ConnectionCount) {
    // SAFETY: a value that the map returned lives as long as the program runs (RCU).
    add(unsafe { &raw mut (*counts).open }, -1);
}

/// Adds to a word of a map's value, without fetching the sum, which needs kernel 5.12.
#[inline(always)]
fn add(word: *mut i64, step: i64) {
    // `core` has no `fetch_add` for a target without compare-and-swap; this is BPF's own XADD.
    // SAFETY: aligned, alive, and every program changes it by this instruction only.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) += {step}", word = in(reg) word, step = in(reg) step)
    };
}

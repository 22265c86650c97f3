//! From a connect to the entry that the agent looks up.
//!
//! connect notes who calls with the socket; `BPF_SOCK_OPS_TCP_CONNECT_CB`, which runs once the source port
//! is chosen and before the SYN leaves, counts it and lets the SYN in; `BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB`, which runs
//! before the listener can have the connection, publishes it; the socket's own close takes it away.
//!
//! Any number of sockets can be about to connect with the same ends: one that is bound to an interface after its ports
//! were chosen is in no other's way, and TCP Fast Open lets it send its SYN whenever it likes. But only one of them gets
//! the answer, and that is the one whose connection it is.

use core::arch::asm;

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
    POD_QUOTA,
    client::{ClientRecord, ConnectionCount, FlowKey, Opener, Sighting, Sightings, mapped},
    counters::VerdictReason,
    redirect::{Destination, Verdict},
};

use crate::{
    maps::{CLIENTS, FLOWS, OBSERVED, PODS, count},
    sock_addr::netns,
};

const AF_INET: u32 = 2;

/// What is known of a connect that is redirection.
#[derive(Clone, Copy)]
pub(crate) struct Redirection {
    /// The cgroup that it counts for.
    pub(crate) pod: u64,
    /// What was asked for, IPv4 as v4-mapped.
    pub(crate) asked: [u8; 16],
    pub(crate) destination: Destination,
    /// To a listener inside the caller's network namespace.
    pub(crate) pod_listener: bool,
    /// From the node's network namespace.
    pub(crate) on_host: bool,
}

/// Notes with the socket who is connecting it, unless its pod holds too many already.
#[inline(always)]
pub(crate) fn record(ctx: &SockAddrContext, redirection: Redirection) -> Result<(), VerdictReason> {
    let counts = counts(redirection.pod).ok_or(VerdictReason::Full)?;
    if open_now(counts) >= POD_QUOTA {
        return Err(VerdictReason::Quota);
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
    // A socket that has a connection can't connect. Were it so, its entry would stay for good.
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
    client.state = ClientRecord::RECORDED;
    Ok(())
}

/// Whether `FLOWS` takes the entries of another connection: one for a listener inside the pod, two for the node's. They are
/// written later, when the connect can't be denied any more: it would wait in vain for an answer to its SYN.
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

/// The record of a socket that was redirection.
#[inline(always)]
#[expect(
    clippy::mut_from_ref,
    reason = "the record is the socket's, which the callback has locked"
)]
fn recorded(ctx: &SockOpsContext) -> Option<&mut ClientRecord> {
    // SAFETY: the context is there for as long as the program runs.
    let union = unsafe { (*ctx.ops).__bindgen_anon_2 };
    // SAFETY: the union has this one field, which the verifier checks.
    let socket = unsafe { union.sk };
    if socket.is_null() {
        return None;
    }
    let map = (&raw const CLIENTS).cast_mut();
    // SAFETY: aya's own accessor takes only a sock_addr context; the map and the socket are real (kernel 5.2).
    let client = unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), 0) };
    // SAFETY: null, or this socket's own record.
    unsafe { client.cast::<ClientRecord>().as_mut() }
}

/// Both ends, as the agent's accept will show them.
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

/// Host order; the context has it in network order, in the upper half on little-endian machines.
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
    /// Reads both, whichever is asked for: were it one or the other, LLVM would choose the pointer first,
    /// and the verifier takes no computed pointer into a context ("dereference of modified ctx ptr").
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

    /// In network order, IPv4 as v4-mapped; the words are in network order already.
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

/// Counts this connection, if it is the one that was recorded, and lets its SYN in.
#[inline(always)]
pub(crate) fn begin(ctx: &SockOpsContext) {
    let Some(client) = recorded(ctx) else { return };
    if client.state != ClientRecord::RECORDED {
        return;
    }
    // Whatever comes of it: what the socket connects to later has to be asked for, and counted, again.
    client.state = ClientRecord::USED;
    let key = key(ctx, client.opener.netns);
    // Not compared with this program's target: while one agent takes over from another, the connect programs may
    // still have the other's.
    if remote_port(ctx) != client.port || key.destination != client.destination {
        return;
    }
    if ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32).is_err() {
        return count(VerdictReason::Full);
    }
    if let Err(reason) = enter(client, key) {
        // The connection stays unattested: its SYN is dropped, or its request refused.
        return count(reason);
    }
    client.key = key;
    client.state = ClientRecord::BEGUN;
}

/// Counts the connection for its pod, and writes its entry for the filter of SYNs: both, or nothing.
#[inline(always)]
fn enter(client: &ClientRecord, key: FlowKey) -> Result<(), VerdictReason> {
    let counts = counts(client.pod).ok_or(VerdictReason::Full)?;
    open(counts);
    // The connect hook has asked, but any number of sockets may have been between there and here.
    let result = if open_now(counts) > POD_QUOTA {
        Err(VerdictReason::Quota)
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

/// Has the filter at the node's listener, which does not see the namespace, let the SYN in. Whose entry that is makes no
/// difference there, and one of a connection that stands is not overwritten.
#[inline(always)]
fn admit(client: &ClientRecord, key: FlowKey) -> Result<(), VerdictReason> {
    let key = FlowKey { netns: 0, ..key };
    // SAFETY: only whether the entry is there is asked.
    if unsafe { FLOWS.get(key) }.is_some() {
        return Ok(());
    }
    FLOWS.insert(key, client.opener, 0).map_err(|_| VerdictReason::Full)
}

/// Publishes who opened this connection, now that it stands: whatever others have written under its ends before.
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
        // Nothing stays half done: the close takes away what there is, and until then its request is refused.
        remove(key, opener.socket);
        return count(VerdictReason::Full);
    }
    client.state = ClientRecord::PUBLISHED;
}

/// Takes the connection's entries away, if they are still this socket's, and its part of the quota.
#[inline(always)]
pub(crate) fn close(ctx: &SockOpsContext) {
    let Some(client) = recorded(ctx) else { return };
    if client.state != ClientRecord::BEGUN && client.state != ClientRecord::PUBLISHED {
        return;
    }
    client.state = ClientRecord::USED;
    let (key, socket) = (client.key, client.opener.socket);
    remove(key, socket);
    if client.pod_listener == 0 {
        remove(FlowKey { netns: 0, ..key }, socket);
    }
    if let Some(counts) = PODS.get_ptr_mut(client.pod) {
        closed(counts);
    }
}

/// Takes an entry away, if it is `socket`'s.
#[inline(always)]
fn remove(key: FlowKey, socket: u64) {
    // SAFETY: the entry is not freed while the program runs (RCU).
    if let Some(entry) = unsafe { FLOWS.get(key) }
        && entry.socket == socket
    {
        let _ = FLOWS.remove(key);
    }
}

/// Counts what would have become of a connect or a datagram.
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

/// What `pod` holds; `None` where the map has no room for another pod.
#[inline(always)]
fn counts(pod: u64) -> Option<*mut ConnectionCount> {
    let counts = PODS.get_ptr_mut(pod);
    if counts.is_some() {
        return held;
    }
    // Another processor may be faster; an insertion is too dear to be tried each time.
    let _ = PODS.insert(pod, ConnectionCount { open: 0, opened: 0 }, BPF_NOEXIST.into());
    PODS.get_ptr_mut(pod)
}

/// How many connections are open.
#[inline(always)]
fn open_now(counts: *mut ConnectionCount) -> i64 {
    // SAFETY: a value that the map returned lives as long as the program runs (RCU).
    let open = unsafe { &raw const (*counts).open };
    // SAFETY: as above, and an aligned word is read whole.
    unsafe { open.read_volatile() }
}

/// Counts a connection that is open from now on.
#[inline(always)]
fn open(counts: *mut ConnectionCount) {
    // SAFETY: a value that the map returned lives as long as the program runs (RCU).
    add(unsafe { &raw mut (*counts).open }, 1);
    // SAFETY: as above.
    add(unsafe { &raw mut (*counts).opened }, 1);
}

/// Counts that one of them is no longer.
#[inline(always)]
fn closed(counts: *mut ConnectionCount) {
    // SAFETY: a value that the map returned lives as long as the program runs (RCU).
    add(unsafe { &raw mut (*counts).open }, -1);
}

/// Adds to a word of a map's value. The sum is not asked for: that needs kernel 5.12.
#[inline(always)]
fn add(word: *mut i64, step: i64) {
    // The target has no compare-and-swap, so `core` gives it no `fetch_add`; BPF's own XADD is one.
    // SAFETY: aligned, alive, and every program changes it by this instruction only.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) += {step}", word = in(reg) word, step = in(reg) step)
    };
}

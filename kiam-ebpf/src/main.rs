//! The kernel programs: they send pods' IMDS traffic to the agent and note who is calling.
//!
//! Entries convert the kernel's context into plain values, ask `kiam_common::redirect`, and apply the
//! verdict. They need kernel 5.10, cgroup v2 and no privilege of the pod's.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod flows;
mod maps;

use core::net::{Ipv4Addr, Ipv6Addr};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE},
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_ktime_get_ns,
        generated::bpf_get_netns_cookie,
    },
    macros::{cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockOpsContext},
};
use aya_log_ebpf::debug;
use kiam_common::{
    CGROUP_LEVELS, CGROUP_PASS, HOST_NETNS_INITIAL, LEASE_NS,
    client::mapped,
    counters::Reason,
    redirect::{self, Caller, Destination, IMDS_PORT, ImdsV6, Verdict},
};

use crate::maps::{CGROUPS, CLIENTS, HOST_NETNS, LEASE, TARGET, count};

/// What the kernel is told: go on.
const ALLOW: i32 = 1;
/// What the kernel is told: `EPERM`.
const REFUSE: i32 = 0;
const SOCK_STREAM: u32 = 1;

/// connect(2) of IPv4 sockets. Kernel 4.17.
#[cgroup_sock_addr(connect4)]
fn kiam_connect4(ctx: SockAddrContext) -> i32 {
    let address = ipv4(&ctx);
    if !redirect::is_imds_v4(address) {
        return ALLOW;
    }
    let verdict = redirect::decide_v4(address, port(&ctx), &TARGET.load(), caller(&ctx));
    apply(&ctx, verdict, mapped(address.octets()))
}

/// connect(2) of IPv6 sockets; v4-mapped destinations run only this one. Kernel 4.17.
#[cgroup_sock_addr(connect6)]
fn kiam_connect6(ctx: SockAddrContext) -> i32 {
    let address = ipv6(&ctx);
    if redirect::imds_v6(address) == ImdsV6::No {
        return ALLOW;
    }
    let verdict = redirect::decide_v6(address, port(&ctx), &TARGET.load(), caller(&ctx));
    apply(&ctx, verdict, address.octets())
}

/// sendto(2) and sendmsg(2) of unconnected IPv4 datagram sockets. Kernel 4.18.
#[cgroup_sock_addr(sendmsg4)]
fn kiam_sendmsg4(ctx: SockAddrContext) -> i32 {
    let address = ipv4(&ctx);
    if !redirect::is_imds_v4(address) {
        return ALLOW;
    }
    let verdict = redirect::decide_v4(address, port(&ctx), &TARGET.load(), caller(&ctx));
    apply(&ctx, verdict, mapped(address.octets()))
}

/// The same of IPv6 sockets. Kernel 4.18.
#[cgroup_sock_addr(sendmsg6)]
fn kiam_sendmsg6(ctx: SockAddrContext) -> i32 {
    let address = ipv6(&ctx);
    if redirect::imds_v6(address) == ImdsV6::No {
        return ALLOW;
    }
    let verdict = redirect::decide_v6(address, port(&ctx), &TARGET.load(), caller(&ctx));
    apply(&ctx, verdict, address.octets())
}

/// getpeername(2) of IPv4 sockets: shows the address that was asked. Kernel 5.8.
#[cgroup_sock_addr(getpeername4)]
fn kiam_getpeername4(ctx: SockAddrContext) -> i32 {
    if let Some([.., a, b, c, d]) = asked(&ctx) {
        // SAFETY: fields of the context that the verifier lets this program type write.
        unsafe { (*ctx.sock_addr).user_ip4 = u32::from_ne_bytes([a, b, c, d]) };
        set_port(&ctx, IMDS_PORT);
    }
    ALLOW
}

/// getpeername(2) of IPv6 sockets. Kernel 5.8.
#[cgroup_sock_addr(getpeername6)]
fn kiam_getpeername6(ctx: SockAddrContext) -> i32 {
    if let Some(asked) = asked(&ctx) {
        set_ipv6(&ctx, asked);
        set_port(&ctx, IMDS_PORT);
    }
    ALLOW
}

/// Publishes redirected connections, and takes them back when they close. Kernel 5.2.
#[sock_ops]
fn kiam_sock_ops(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => flows::publish(&ctx),
        // The arguments are the old state and the new state.
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == BPF_TCP_CLOSE => flows::close(&ctx),
        _ => {}
    }
    1
}

/// Does what was decided.
#[inline(always)]
fn apply(ctx: &SockAddrContext, verdict: Verdict, asked: [u8; 16]) -> i32 {
    let (reason, answer) = match verdict {
        Verdict::Pass(reason) => (reason, ALLOW),
        Verdict::Deny(reason) => (reason, REFUSE),
        Verdict::Redirect(destination) => match flows::record(ctx, asked, destination.port()) {
            Err(reason) => (reason, REFUSE),
            Ok(()) => {
                rewrite(ctx, destination);
                (Reason::Redirected, ALLOW)
            }
        },
    };
    count(reason);
    // SAFETY: the helper has no preconditions (kernel 4.18).
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    debug!(ctx, "IMDS traffic of cgroup {}: reason {}", cgroup, reason as u32);
    answer
}

#[inline(always)]
fn rewrite(ctx: &SockAddrContext, destination: Destination) {
    match destination {
        Destination::V4(address, port) => {
            // SAFETY: a field of the context that the verifier lets this program type write.
            unsafe { (*ctx.sock_addr).user_ip4 = u32::from_ne_bytes(address.octets()) };
            set_port(ctx, port);
        }
        Destination::V6(address, port) => {
            set_ipv6(ctx, address.octets());
            set_port(ctx, port);
        }
    }
}

#[inline(always)]
fn caller(ctx: &SockAddrContext) -> Caller {
    Caller { exempt: exempt(ctx), leased: leased(), stream: stream(ctx) }
}

/// The nearest cgroup that is listed decides; a hostNetwork pod passes where the operator says so.
#[inline(always)]
fn exempt(ctx: &SockAddrContext) -> bool {
    // SAFETY: the helper has no preconditions (kernel 4.18).
    let own = unsafe { bpf_get_current_cgroup_id() };
    // SAFETY: the entry is not freed while the program runs (RCU).
    let mut nearest = unsafe { CGROUPS.get(own) }.copied();
    if nearest.is_none() {
        // From the root down, so the last one found is the nearest.
        for level in 1..=CGROUP_LEVELS {
            // SAFETY: the helper has no preconditions; beyond the leaf it answers 0.
            let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
            if ancestor == 0 {
                break;
            }
            // SAFETY: as above.
            if let Some(mark) = unsafe { CGROUPS.get(ancestor) } {
                nearest = Some(*mark);
            }
        }
    }
    if let Some(mark) = nearest {
        return mark == CGROUP_PASS;
    }
    on_host_network(ctx)
}

/// Whether the socket is of the network namespace whose pods pass.
#[inline(always)]
fn on_host_network(ctx: &SockAddrContext) -> bool {
    let host = match HOST_NETNS.load() {
        0 => return false,
        // SAFETY: without a context the helper answers for the initial namespace (kernel 5.7).
        HOST_NETNS_INITIAL => unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) },
        cookie => cookie,
    };
    // SAFETY: the helper takes the program's own context.
    host == unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

#[inline(always)]
fn leased() -> bool {
    let Some(renewed) = LEASE.get(0) else { return false };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    *renewed != 0 && now.wrapping_sub(*renewed) < LEASE_NS
}

/// MPTCP sockets are streams too; their protocol differs, so it is not asked.
#[inline(always)]
fn stream(ctx: &SockAddrContext) -> bool {
    // SAFETY: a field of the context.
    unsafe { (*ctx.sock_addr).type_ == SOCK_STREAM }
}

/// What a redirected socket asked for, if it is connected to the agent now.
#[inline(always)]
fn asked(ctx: &SockAddrContext) -> Option<[u8; 16]> {
    // SAFETY: the context's socket is the one whose peer is asked for.
    let client = unsafe { CLIENTS.get_ptr_mut(ctx) };
    // SAFETY: null, or this socket's own record.
    let client = unsafe { client.as_ref() }?;
    (client.port == port(ctx)).then_some(client.asked)
}

#[inline(always)]
fn ipv4(ctx: &SockAddrContext) -> Ipv4Addr {
    // SAFETY: a field of the context, in network order.
    Ipv4Addr::from_octets(unsafe { (*ctx.sock_addr).user_ip4 }.to_ne_bytes())
}

#[inline(always)]
fn ipv6(ctx: &SockAddrContext) -> Ipv6Addr {
    // SAFETY: fields of the context, in network order.
    let words = unsafe { (*ctx.sock_addr).user_ip6 };
    let [a, b, c, d] = words.map(u32::from_be);
    Ipv6Addr::from_segments([
        (a >> 16) as u16,
        a as u16,
        (b >> 16) as u16,
        b as u16,
        (c >> 16) as u16,
        c as u16,
        (d >> 16) as u16,
        d as u16,
    ])
}

/// Host order.
#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: a field of the context, network order in its lower half.
    u16::from_be(unsafe { (*ctx.sock_addr).user_port } as u16)
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: a field of the context that the verifier lets this program type write.
    unsafe { (*ctx.sock_addr).user_port = port.to_be().into() }
}

#[inline(always)]
fn set_ipv6(ctx: &SockAddrContext, address: [u8; 16]) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    let words = [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]];
    let mut index = 0;
    while index < 4 {
        // SAFETY: a field of the context that the verifier lets this program type write.
        unsafe { (*ctx.sock_addr).user_ip6[index] = u32::from_ne_bytes(words[index]) };
        index += 1;
    }
}

/// A BPF program cannot panic: the verifier proves that this is never reached.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers such as `bpf_sk_storage_get` ask for a GPL-compatible licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

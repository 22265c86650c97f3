//! Reads and writes the context of socket address hooks.

use core::net::{Ipv4Addr, Ipv6Addr};

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext,
};
use kiam_common::{HOST_NETNS_INITIAL, redirect::Destination};

use crate::maps::HOST_NETNS;

const SOCK_STREAM: u32 = 1;

#[inline(always)]
pub(crate) fn ipv4(ctx: &SockAddrContext) -> Ipv4Addr {
    // SAFETY: a field of the context, in network order.
    Ipv4Addr::from_octets(unsafe { (*ctx.sock_addr).user_ip4 }.to_ne_bytes())
}

#[inline(always)]
pub(crate) fn ipv6(ctx: &SockAddrContext) -> Ipv6Addr {
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

/// The destination port, in host order.
#[inline(always)]
pub(crate) fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: a field of the context, network order in its lower half.
    u16::from_be(unsafe { (*ctx.sock_addr).user_port } as u16)
}

/// Whether the socket is a stream, of TCP or MPTCP.
#[inline(always)]
pub(crate) fn is_stream(ctx: &SockAddrContext) -> bool {
    // SAFETY: a field of the context.
    unsafe { (*ctx.sock_addr).type_ == SOCK_STREAM }
}

/// Whether the socket is in the node's own network namespace.
#[inline(always)]
pub(crate) fn is_on_host_network(ctx: &SockAddrContext) -> bool {
    let host = match HOST_NETNS.load() {
        // SAFETY: without a context the helper answers for the initial namespace (kernel 5.7).
        HOST_NETNS_INITIAL => unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) },
        cookie => cookie,
    };
    host == netns(ctx)
}

/// The cookie of the socket's network namespace. Kernel 5.7.
#[inline(always)]
pub(crate) fn netns(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the helper takes the program's own context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Whether the socket is bound to an interface (`SO_BINDTODEVICE`): it can't reach the loopback of its namespace.
#[inline(always)]
pub(crate) fn is_bound_to_interface(ctx: &SockAddrContext) -> bool {
    // SAFETY: a field of the context.
    let union = unsafe { (*ctx.sock_addr).__bindgen_anon_1 };
    // SAFETY: the union has this one field, the socket that the context always has (kernel 5.3).
    let socket = unsafe { union.sk };
    // SAFETY: a field of the socket, which the verifier checks.
    unsafe { (*socket).bound_dev_if != 0 }
}

/// Replaces the connect's destination.
#[inline(always)]
pub(crate) fn rewrite(ctx: &SockAddrContext, destination: Destination) {
    match destination {
        Destination::V4(address, port) => {
            set_ipv4(ctx, address.octets());
            set_port(ctx, port);
        }
        Destination::V6(address, port) => {
            set_ipv6(ctx, address.octets());
            set_port(ctx, port);
        }
    }
}

#[inline(always)]
pub(crate) fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: a field of the context that the verifier lets this program type write.
    unsafe { (*ctx.sock_addr).user_port = port.to_be().into() }
}

#[inline(always)]
pub(crate) fn set_ipv4(ctx: &SockAddrContext, address: [u8; 4]) {
    // SAFETY: a field of the context that the verifier lets this program type write.
    unsafe { (*ctx.sock_addr).user_ip4 = u32::from_ne_bytes(address) };
}

#[inline(always)]
pub(crate) fn set_ipv6(ctx: &SockAddrContext, address: [u8; 16]) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    let words = [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]];
    let mut index = 0;
    while index < 4 {
        // SAFETY: a field of the context that the verifier lets this program type write.
        unsafe { (*ctx.sock_addr).user_ip6[index] = u32::from_ne_bytes(words[index]) };
        index += 1;
    }
}

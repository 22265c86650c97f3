//! Makes sure that connections reach only the agent's listeners, and that only SYNs of recorded connects reach those.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_hdr_start_off::BPF_HDR_START_NET, bpf_sock, bpf_sock_tuple,
        bpf_sock_tuple__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::generated::{
        bpf_sk_lookup_tcp, bpf_sk_release, bpf_sk_storage_get, bpf_skb_load_bytes_relative,
    },
    programs::{SkBuffContext, SockAddrContext},
};
use kiam_common::{
    client::{FlowKey, mapped},
    counters::VerdictReason,
    redirect::Destination,
};

use crate::maps::{FLOWS, LISTENERS, count};

/// `skb->protocol` of IPv4 and IPv6 packets: network order in the lower half.
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
/// The offset of the TCP header's flags, and the flags of a SYN.
const TCP_FLAGS: usize = 13;
const SYN: u8 = 0x02;
const SYN_ACK_RST: u8 = 0x16;
/// The results of a socket filter: drop the packet, or keep all of it.
const DROP: i64 = 0;
const KEEP: i64 = u32::MAX as i64;

/// Whether the listener at `destination` in the caller's network namespace is the agent's. A listener that was bound after
/// the agent's end has no mark. Kernel 5.2.
#[inline(always)]
pub(crate) fn is_agents(ctx: &SockAddrContext, destination: Destination) -> bool {
    let socket = match destination {
        Destination::V4(address, port) => lookup_v4(ctx, address.octets(), port),
        Destination::V6(address, port) => match address.to_ipv4_mapped() {
            Some(v4) => lookup_v4(ctx, v4.octets(), port),
            None => lookup_v6(ctx, address.octets(), port),
        },
    };
    if socket.is_null() {
        return false;
    }
    let map = (&raw const LISTENERS).cast_mut();
    // SAFETY: the map is a socket storage, and the socket is held.
    let mark = unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), 0) };
    let marked = !mark.is_null();
    // SAFETY: held by the lookup, and not used from here on.
    unsafe { bpf_sk_release(socket.cast()) };
    marked
}

/// The listener at the address, which the caller must release. No connection has port 0, so that the lookup finds no other
/// socket.
#[inline(always)]
fn lookup_v4(ctx: &SockAddrContext, address: [u8; 4], port: u16) -> *mut bpf_sock {
    let v4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
        saddr: 0,
        daddr: u32::from_ne_bytes(address),
        sport: 0,
        dport: port.to_be(),
    };
    lookup(ctx, bpf_sock_tuple__bindgen_ty_1 { ipv4: v4 }, size_of_val(&v4))
}

#[inline(always)]
fn lookup_v6(ctx: &SockAddrContext, address: [u8; 16], port: u16) -> *mut bpf_sock {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    let words = [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]];
    let v6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
        saddr: [0; 4],
        daddr: words.map(u32::from_ne_bytes),
        sport: 0,
        dport: port.to_be(),
    };
    lookup(ctx, bpf_sock_tuple__bindgen_ty_1 { ipv6: v6 }, size_of_val(&v6))
}

#[inline(always)]
fn lookup(ctx: &SockAddrContext, ends: bpf_sock_tuple__bindgen_ty_1, size: usize) -> *mut bpf_sock {
    let mut tuple = bpf_sock_tuple { __bindgen_anon_1: ends };
    // SAFETY: the helper takes the program's own context, and a tuple of the family that `size` tells.
    unsafe {
        bpf_sk_lookup_tcp(
            ctx.as_ptr(),
            &raw mut tuple,
            size as u32,
            BPF_F_CURRENT_NETNS as i64 as u64,
            0,
        )
    }
}

/// Drops SYNs without a recorded connect, so that they take no place in the listener's queue, and keeps all other packets.
#[inline(always)]
pub(crate) fn filter(ctx: &SkBuffContext) -> i64 {
    // A socket filter's packet begins with the TCP header.
    let Ok(flags) = ctx.load::<u8>(TCP_FLAGS) else { return DROP };
    if flags & SYN_ACK_RST != SYN {
        return KEEP;
    }
    if key(ctx).is_some_and(|key| {
        // SAFETY: only the entry's presence is used.
        unsafe { FLOWS.get(key) }.is_some()
    }) {
        return KEEP;
    }
    count(VerdictReason::Syn);
    DROP
}

/// The connection's key without a namespace: the listener's side does not see the opener's.
#[inline(always)]
fn key(ctx: &SkBuffContext) -> Option<FlowKey> {
    let [a, b, c, d] = ctx.load::<[u8; 4]>(0).ok()?;
    // SAFETY: a field of the context.
    let (source, destination) = match unsafe { (*ctx.skb.skb).protocol } {
        ETH_P_IP => (mapped(network_header::<4>(ctx, 12)?), mapped(network_header::<4>(ctx, 16)?)),
        ETH_P_IPV6 => (network_header::<16>(ctx, 8)?, network_header::<16>(ctx, 24)?),
        _ => return None,
    };
    Some(FlowKey {
        netns: 0,
        source,
        destination,
        source_port_be: u16::from_ne_bytes([a, b]),
        destination_port_be: u16::from_ne_bytes([c, d]),
        pad: 0,
    })
}

/// `N` bytes of the IP header. Kernel 4.18.
#[inline(always)]
fn network_header<const N: usize>(ctx: &SkBuffContext, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the buffer is `N` bytes long.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.as_ptr(),
            offset,
            bytes.as_mut_ptr().cast(),
            N as u32,
            BPF_HDR_START_NET,
        )
    };
    (result == 0).then_some(bytes)
}

//! Drops packets to the IMDS that bypassed the connect hooks, by their sender. They come from raw and packet sockets,
//! connections older than the agent, and addresses that a later program rewrote.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_SK_STORAGE_GET_F_CREATE, bpf_hdr_start_off::BPF_HDR_START_NET},
    helpers::generated::{
        bpf_sk_fullsock, bpf_sk_storage_get, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id,
        bpf_skb_load_bytes, bpf_skb_load_bytes_relative,
    },
    programs::SockAddrContext,
};
use core::net::{Ipv4Addr, Ipv6Addr};
use kiam_common::{
    CGROUP_LEVELS, CgroupMark,
    denial::Sender,
    redirect::{ImdsV6, imds_v6, is_imds_v4},
};

use crate::{callers::mark_of, maps::PASSED};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
const ETHERNET_HEADER: u32 = 14;
const VLAN_TAG: u32 = 4;

/// Marks the socket, whose connect or sendmsg to the IMDS passed.
#[inline(always)]
pub(crate) fn let_through(ctx: &SockAddrContext) {
    // SAFETY: the context is there for as long as the program runs.
    let union = unsafe { (*ctx.sock_addr).__bindgen_anon_1 };
    // SAFETY: the union has this one field, which the verifier checks.
    let socket = unsafe { union.sk };
    if socket.is_null() {
        return;
    }
    let mut passed = 1_u32;
    let map = (&raw const PASSED).cast_mut();
    let value = (&raw mut passed).cast();
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: the map is a socket storage of `u32`; without memory the socket stays unmarked, and is denied.
    unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), value, create) };
}

/// Whether the packet's destination is the IMDS, by its IP header.
#[inline(always)]
pub(crate) fn is_for_imds(skb: *mut __sk_buff) -> bool {
    // SAFETY: a field of the context, in network order.
    match u16::from_be(unsafe { (*skb).protocol } as u16) {
        ETH_P_IP => network_header::<4>(skb, 16).is_some_and(v4),
        ETH_P_IPV6 => network_header::<16>(skb, 24).is_some_and(v6),
        _ => false,
    }
}

/// Whether the frame's destination is the IMDS, by its bytes: of a packet socket's frames, the kernel's metadata may be
/// wrong.
#[inline(always)]
pub(crate) fn is_frame_for_imds(skb: *mut __sk_buff) -> bool {
    // With up to two VLAN tags: receivers ignore a priority tag (VLAN 0).
    for tags in 0..3 {
        let begin = ETHERNET_HEADER + tags * VLAN_TAG;
        match frame::<2>(skb, begin - 2).map(u16::from_be_bytes) {
            Some(ETH_P_IP) => return frame::<4>(skb, begin + 16).is_some_and(v4),
            Some(ETH_P_IPV6) => return frame::<16>(skb, begin + 24).is_some_and(v6),
            Some(ETH_P_8021Q | ETH_P_8021AD) => {}
            _ => return false,
        }
    }
    false
}

#[inline(always)]
fn v4(address: [u8; 4]) -> bool {
    is_imds_v4(Ipv4Addr::from_octets(address))
}

#[inline(always)]
fn v6(address: [u8; 16]) -> bool {
    imds_v6(Ipv6Addr::from_octets(address)) != ImdsV6::No
}

/// The sender of the packet. Kernel 5.2.
#[inline(always)]
pub(crate) fn sender(skb: *mut __sk_buff) -> Sender {
    if was_let_through(skb) {
        return Sender::Passed;
    }
    // SAFETY: the helper takes the program's own context (kernel 4.18).
    let own = unsafe { bpf_skb_cgroup_id(skb) };
    if own == 0 {
        return Sender::NoSocket;
    }
    let own_mark = mark_of(own);
    let mut nearest = own_mark;
    let mut below_pods = CgroupMark::Pods.is(own_mark);
    for level in 1..=CGROUP_LEVELS {
        // SAFETY: the helper takes the program's own context; beyond the leaf it answers 0 (kernel 4.19).
        let ancestor = unsafe { bpf_skb_ancestor_cgroup_id(skb, level) };
        if ancestor == 0 {
            break;
        }
        let mark = mark_of(ancestor);
        below_pods |= CgroupMark::Pods.is(mark);
        // From the root down, so the last one found is the nearest, but for the socket's own.
        if CgroupMark::Unmarked.is(own_mark) && !CgroupMark::Unmarked.is(mark) {
            nearest = mark;
        }
    }
    Sender::of(nearest, below_pods)
}

/// Whether the packet came in by an interface, unlike those that the node's kernel sends itself, such as a last ACK.
#[inline(always)]
pub(crate) fn was_forwarded(skb: *mut __sk_buff) -> bool {
    // SAFETY: a field of the context.
    let came_by = unsafe { (*skb).ingress_ifindex };
    came_by != 0
}

#[inline(always)]
fn was_let_through(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is there for as long as the program runs.
    let union = unsafe { (*skb).__bindgen_anon_2 };
    // SAFETY: the union has this one field, which the verifier checks.
    let socket = unsafe { union.sk };
    if socket.is_null() {
        return false;
    }
    // SAFETY: not null (kernel 5.1).
    let socket = unsafe { bpf_sk_fullsock(socket) };
    if socket.is_null() {
        return false;
    }
    let map = (&raw const PASSED).cast_mut();
    // SAFETY: the map is a socket storage, and the socket is a whole one.
    let note = unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), 0) };
    !note.is_null()
}

/// `N` bytes of the IP header. Kernel 4.18.
#[inline(always)]
fn network_header<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let buffer = bytes.as_mut_ptr().cast();
    // SAFETY: the buffer is `N` bytes long.
    let result = unsafe {
        bpf_skb_load_bytes_relative(skb.cast(), offset, buffer, N as u32, BPF_HDR_START_NET)
    };
    (result == 0).then_some(bytes)
}

/// `N` bytes of the frame.
#[inline(always)]
fn frame<const N: usize>(skb: *mut __sk_buff, offset: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the buffer is `N` bytes long.
    let result =
        unsafe { bpf_skb_load_bytes(skb.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    (result == 0).then_some(bytes)
}

//! Requests for the kernel's list of TCP sockets (`sock_diag(7)`).

use netlink_packet_core::Nla as _;
use netlink_packet_sock_diag::{
    AF_INET, IPPROTO_TCP,
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};

/// The attribute with a socket's cgroup id (`linux/inet_diag.h`). Kernel 5.8.
const INET_DIAG_CGROUP_ID: u16 = 21;

/// A request for TCP sockets of `family` in one of `states`, MPTCP's subflows included.
pub(crate) fn tcp_sockets(family: u8, states: StateFlags) -> InetRequest {
    InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states,
        socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
    }
}

/// The id of the cgroup that `socket` was created in.
pub(crate) fn cgroup_id(socket: &InetResponse) -> Option<u64> {
    socket.nlas.iter().find_map(|attribute| match attribute {
        Nla::Other(other) if other.kind() == INET_DIAG_CGROUP_ID && other.value_len() == 8 => {
            let mut value = [0; 8];
            other.emit_value(&mut value);
            Some(u64::from_ne_bytes(value))
        }
        _ => None,
    })
}

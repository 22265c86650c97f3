//! What neither rustix nor socket2 has a call for.

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd},
};

use socket2::{SockAddr, SockAddrStorage};

use super::TOS;

/// Sets an option whose value is an `int`.
///
/// # Errors
///
/// The kernel's.
pub(crate) fn set_option(socket: &impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer is to a live integer, and its size is said; the descriptor is open.
    let answer = unsafe {
        libc::setsockopt(fd, level, name, (&raw const value).cast(), size_of::<i32>() as u32)
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Marks what the socket sends as an attacker's.
pub(crate) fn mark(socket: &impl AsFd) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_IP, libc::IP_TOS, TOS.into())
}

/// The address of a station on a link, for packet sockets; `protocol` is an `ETH_P_…`.
pub(crate) fn link_address(interface: u32, mac: [u8; 6], protocol: u16) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: any bytes are a valid `sockaddr_ll`, which fits into the storage.
    let link = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    link.sll_family = libc::AF_PACKET as u16;
    link.sll_protocol = protocol.to_be();
    link.sll_ifindex = interface.cast_signed();
    link.sll_halen = 6;
    link.sll_addr[..6].copy_from_slice(&mac);
    // SAFETY: the storage holds a whole `sockaddr_ll`.
    unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as u32) }
}

//! What neither rustix nor socket2 has a call for.

use std::{
    io,
    mem::size_of,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd},
};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use super::TOS;

const LOOPBACK: &[u8] = b"lo";

/// Sets an option whose value is an `int`.
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

/// Moves the calling thread into a new network namespace, whose loopback interface has all addresses of the class A
/// network of `address`: the lab's, its own and others'.
pub(crate) fn enter_new_network(address: Ipv4Addr) -> io::Result<()> {
    // SAFETY: NEWNET does not unshare the descriptor table, the one flag that is unsafe.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    let control = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let mut request = interface_request();
    let mut bytes = [0; size_of::<libc::sockaddr>()];
    bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    bytes[4..8].copy_from_slice(&address.octets());
    // SAFETY: both are plain bytes of this size.
    request.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<[u8; 16], libc::sockaddr>(bytes) };
    change(&control, libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    change(&control, libc::SIOCSIFFLAGS, &request)
}

fn interface_request() -> libc::ifreq {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(LOOPBACK) {
        *to = *from as libc::c_char;
    }
    libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
}

fn change(control: &Socket, call: libc::Ioctl, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the request is a whole `ifreq`, which both calls only read.
    let answer = unsafe { libc::ioctl(control.as_raw_fd(), call, std::ptr::from_ref(request)) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

//! Counts the packets that leave the node for the IMDS from the self-test's addresses.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, eth, socket_with};

/// A packet socket that receives packets to the IMDS, in the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

/// Classic BPF of `linux/filter.h`: absolute loads of 16 and 32 bits, equal-jumps, returns.
const LDH: u16 = 0x28;
const LDW: u16 = 0x20;
const JEQ: u16 = 0x15;
const RET: u16 = 0x06;
/// The offset of the protocol for filters: `SKF_AD_OFF + SKF_AD_PROTOCOL`.
const PROTOCOL: u32 = 0xffff_f000;

// === impl Tap ===

impl Tap {
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Without a protocol, so that no packet comes before the filter is attached.
        let tap = Self(socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, None)?);
        tap.filter()?;
        tap.bind()?;
        Ok(tap)
    }

    /// Attaches a filter for packets to 169.254.169.254 or `fd00:ec2::254`, by the first and last words of the address.
    fn filter(&self) -> io::Result<()> {
        let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
        let mut steps = [
            step(LDH, PROTOCOL, 0, 0),
            step(JEQ, 0x0800, 0, 2),
            step(LDW, 16, 0, 0),
            step(JEQ, 0xa9fe_a9fe, 5, 6),
            step(JEQ, 0x86dd, 0, 5),
            step(LDW, 24, 0, 0),
            step(JEQ, 0xfd00_0ec2, 0, 3),
            step(LDW, 36, 0, 0),
            step(JEQ, 0x0254, 0, 1),
            step(RET, 128, 0, 0),
            step(RET, 0, 0, 0),
        ];
        let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
        // SAFETY: the descriptor is open, and the program and its steps outlive the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of_val(&program) as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Starts receiving, on every interface and in both directions (only `ETH_P_ALL` shows outgoing packets).
    fn bind(&self) -> io::Result<()> {
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = u32::from(eth::ALL.as_raw()) as u16;
        // SAFETY: the descriptor is open, and the address is of the size that is given.
        let result = unsafe {
            libc::bind(
                self.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The number of packets from `sources` that have left by any interface since the last call.
    pub(super) fn left(&self, sources: &[IpAddr]) -> u32 {
        let mut count = 0;
        while let Ok((head, kind)) = self.next() {
            let outgoing = kind == libc::PACKET_OUTGOING;
            if outgoing && source(&head).is_some_and(|source| sources.contains(&source)) {
                count += 1;
            }
        }
        count
    }

    /// The next packet's head and kind; an error when there is none.
    fn next(&self) -> io::Result<([u8; 40], u8)> {
        let mut head = [0; 40];
        // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the descriptor is open; the kernel writes at most the sizes given to the buffers given.
        let result = unsafe {
            libc::recvfrom(
                self.0.as_raw_fd(),
                head.as_mut_ptr().cast(),
                head.len(),
                0,
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok((head, address.sll_pkttype)) }
    }
}

/// The source of an IP packet.
fn source(packet: &[u8; 40]) -> Option<IpAddr> {
    match packet[0] >> 4 {
        4 => packet[12..].first_chunk().map(|octets: &[u8; 4]| Ipv4Addr::from(*octets).into()),
        6 => packet[8..].first_chunk().map(|octets: &[u8; 16]| Ipv6Addr::from(*octets).into()),
        _ => None,
    }
}

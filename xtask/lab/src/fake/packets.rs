//! Counts packets to the metadata service's addresses as they come in, whatever sort of socket sent them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socket_with, sockopt},
};

use crate::{IMDS_V4, IMDS_V6, Netns};

/// A share of a minute of loaded tests fits.
const RECEIVE_BUFFER: usize = 16 << 20;
const DRAIN_EVERY: Duration = Duration::from_millis(20);

/// A packet socket in a namespace, emptied now and then and before each answer.
#[derive(Debug)]
pub(super) struct Packets(Arc<Mutex<Tap>>);

#[derive(Debug)]
struct Tap {
    socket: OwnedFd,
    seen: BTreeMap<Kind, u64>,
}

/// A packet's source and its type of service (0 in IPv6).
type Kind = (IpAddr, u8);

// === impl Packets ===

impl Packets {
    pub(super) fn watch(netns: &Netns) -> Result<Self> {
        let socket = netns
            .enter(|| {
                // With SOCK_DGRAM what is received begins with the IP header.
                let (family, kind) = (AddressFamily::PACKET, SocketType::DGRAM);
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                socket_with(family, kind, flags, Some(rustix::net::eth::ALL))
            })?
            .context("opening a packet socket")?;
        sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)
            .context("enlarging a packet socket's buffer")?;
        let tap = Arc::new(Mutex::new(Tap { socket, seen: BTreeMap::new() }));
        let weak = Arc::downgrade(&tap);
        thread::spawn(move || drain(&weak));
        Ok(Self(tap))
    }

    /// How many packets have come in, by source.
    pub(super) fn all(&self) -> BTreeMap<IpAddr, u64> {
        let mut all = BTreeMap::new();
        for ((source, _), count) in self.kinds() {
            *all.entry(source).or_default() += count;
        }
        all
    }

    /// The same, by source and type of service.
    pub(super) fn kinds(&self) -> BTreeMap<Kind, u64> {
        let mut tap = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tap.drain();
        tap.seen.clone()
    }
}

// === impl Tap ===

impl Tap {
    fn drain(&mut self) {
        let mut head = [0; 40];
        loop {
            match recv(&self.socket, &mut head, RecvFlags::DONTWAIT) {
                Ok((length, _)) => {
                    if let Some((kind, destination)) = ends(&head[..length])
                        && (destination == IMDS_V4 || destination == IMDS_V6)
                    {
                        *self.seen.entry(kind).or_default() += 1;
                    }
                }
                // ENETDOWN and its kind say that an interface went; the socket goes on.
                Err(Errno::AGAIN) => return,
                Err(_) => {}
            }
        }
    }
}

fn drain(tap: &Weak<Mutex<Tap>>) {
    while let Some(tap) = tap.upgrade() {
        tap.lock().unwrap_or_else(PoisonError::into_inner).drain();
        drop(tap);
        thread::sleep(DRAIN_EVERY);
    }
}

/// Source, type of service and destination of an IP packet.
fn ends(packet: &[u8]) -> Option<(Kind, IpAddr)> {
    let v4 = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?)));
    let v6 = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?)));
    match packet.first()? >> 4 {
        4 => Some(((v4(12)?, packet[1]), v4(16)?)),
        6 => Some(((v6(8)?, 0), v6(24)?)),
        _ => None,
    }
}

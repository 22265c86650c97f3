//! Datagrams: UDP and unprivileged ping sockets.

use std::{
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
};

use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::sys::mark;

const PAYLOAD: &[u8] = b"kiam-lab";

/// How the datagram is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// UDP: connect(2), then send(2).
    Connect,
    /// UDP: sendto(2).
    SendTo,
    /// UDP: sendmmsg(2), two at once.
    SendMany,
    /// An echo request by a ping socket, sendto(2).
    Ping,
    /// An echo request by a ping socket that is connected first.
    PingConnected,
}

/// Sends to `to`.
pub(super) fn send(way: Way, to: SocketAddr) -> io::Result<()> {
    let ping = matches!(way, Way::Ping | Way::PingConnected);
    let protocol = match to.ip() {
        _ if !ping => Protocol::UDP,
        IpAddr::V4(_) => Protocol::ICMPV4,
        IpAddr::V6(_) => Protocol::ICMPV6,
    };
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, Some(protocol))?;
    mark(&socket)?;
    match way {
        Way::Connect => {
            socket.connect(&to.into())?;
            socket.send(PAYLOAD)?;
        }
        Way::SendTo => drop(socket.send_to(PAYLOAD, &to.into())?),
        Way::SendMany => send_many(&socket, to)?,
        Way::Ping => drop(socket.send_to(&echo(to), &to.into())?),
        Way::PingConnected => {
            socket.connect(&to.into())?;
            socket.send(&echo(to))?;
        }
    }
    Ok(())
}

fn send_many(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let slices = [IoSlice::new(PAYLOAD)];
    let address = to.into();
    let (mut first, mut second) = (SendAncillaryBuffer::default(), SendAncillaryBuffer::default());
    let mut messages = [
        MMsgHdr::new_with_addr(&address, &slices, &mut first),
        MMsgHdr::new_with_addr(&address, &slices, &mut second),
    ];
    sendmmsg(socket, &mut messages, SendFlags::empty())?;
    Ok(())
}

/// The kernel fills in the identifier and the checksum.
fn echo(to: SocketAddr) -> [u8; 8] {
    [if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0, 0, 0, 0, 1]
}

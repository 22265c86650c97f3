//! Raw IP sockets, which no hook at connect sees.

use std::{io, net::IpAddr};

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::{bytes, sys::mark};

/// What is sent, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// An echo request.
    Echo,
    /// A TCP SYN by sendto(2).
    SynSendTo,
    /// A TCP SYN by connect(2) and send(2).
    SynConnect,
    /// A TCP SYN with its IP header (`IP_HDRINCL`, `IPV6_HDRINCL`), so that the source can be anybody's.
    SynHeader,
}

/// Sends to `to`, as from `from`. They must be of one family.
pub(super) fn send(way: Way, from: IpAddr, to: IpAddr) -> io::Result<()> {
    let address = (to, 0).into();
    let protocol = match (way, to) {
        (Way::Echo, IpAddr::V4(_)) => Protocol::ICMPV4,
        (Way::Echo, IpAddr::V6(_)) => Protocol::ICMPV6,
        (Way::SynHeader, _) => Protocol::from(libc::IPPROTO_RAW),
        _ => Protocol::TCP,
    };
    let socket = Socket::new(Domain::for_address(address), Type::RAW, Some(protocol))?;
    if to.is_ipv4() {
        mark(&socket)?;
    }
    let address = address.into();
    match way {
        Way::Echo => drop(socket.send_to(&bytes::echo(from, to), &address)?),
        Way::SynSendTo => drop(socket.send_to(&bytes::syn(from, to), &address)?),
        Way::SynConnect => {
            socket.connect(&address)?;
            socket.send(&bytes::syn(from, to))?;
        }
        Way::SynHeader => {
            match to {
                IpAddr::V4(_) => socket.set_header_included_v4(true)?,
                IpAddr::V6(_) => socket.set_header_included_v6(true)?,
            }
            let packet = bytes::with_ip_header(from, to, &bytes::syn(from, to));
            socket.send_to(&packet, &address)?;
        }
    }
    Ok(())
}

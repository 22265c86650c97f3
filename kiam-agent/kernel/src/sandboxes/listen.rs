//! Opens pod listeners in a network namespace.

use std::{
    fs::File,
    io,
    net::{
        IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, UdpSocket,
    },
    os::fd::AsFd,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};
use tracing::debug;

use super::{NoListenerReason, claims::Claims};
use crate::sys::{cookie_of, defer_accept, inside, loopback_is_up, ports};

/// The backlog of a listener. The namespace's `somaxconn`, 4096 by default, may limit it further.
const BACKLOG: i32 = 4096;

/// A network namespace that is verified to be the pod's.
#[derive(Debug)]
pub(super) struct VerifiedNamespace {
    pub(super) cookie: u64,
    /// The pod listeners, or why there are none.
    pub(super) listening: Result<ListenerSet, NoListenerReason>,
}

/// The open listeners of one namespace; none if the port is 0.
#[derive(Debug, Default)]
pub(super) struct ListenerSet {
    pub(super) port: u16,
    pub(super) sockets: Vec<TcpListener>,
}

/// Verifies that `namespace` is the pod's: it must have one of `addresses`, if any is known yet. Opens or inherits pod
/// listeners in it, if `listens`.
pub(super) fn open(
    namespace: &File,
    addresses: &[IpAddr],
    claims: &Claims,
    listens: bool,
) -> Result<VerifiedNamespace, NoListenerReason> {
    let open_here = || {
        if !addresses.is_empty() && !have_one(addresses) {
            return Err(NoListenerReason::NoAddress);
        }
        // The runtime may still be setting up the namespace.
        if addresses.is_empty() && !loopback_is_up().map_err(failed("SIOCGIFFLAGS"))? {
            return Err(NoListenerReason::LoopbackDown);
        }
        let cookie = cookie_here()?;
        let listening = match listens {
            true => listen_here(claims.inherited(cookie)),
            false => Err(NoListenerReason::NodePath),
        };
        Ok(VerifiedNamespace { cookie, listening })
    };
    inside(namespace, || Ok(open_here())).map_err(failed("setns"))?
}

/// Opens listeners in `namespace`, which is verified.
pub(super) fn listen_in(namespace: &File) -> Result<ListenerSet, NoListenerReason> {
    inside(namespace, || Ok(listen_here(Vec::new()))).map_err(failed("setns"))?
}

/// Whether one of `addresses` is on an interface in `namespace`.
pub(super) fn has_one(namespace: &File, addresses: &[IpAddr]) -> Result<bool, NoListenerReason> {
    inside(namespace, || Ok(have_one(addresses))).map_err(failed("setns"))
}

/// Whether one of `addresses` is local in this thread's namespace: it can be bound, and there is a route to it. This lists
/// nothing, since a pod can add any number of addresses.
fn have_one(addresses: &[IpAddr]) -> bool {
    // A namespace that never had an IPv4 address has no local table, and allows binding every address.
    let is_local = |address: &IpAddr| {
        UdpSocket::bind((*address, 0)).is_ok_and(|socket| socket.connect((*address, 9)).is_ok())
    };
    addresses.iter().any(is_local)
}

fn listen_here(inherited: Vec<TcpListener>) -> Result<ListenerSet, NoListenerReason> {
    if !loopback_is_up().map_err(failed("SIOCGIFFLAGS"))? {
        return Err(NoListenerReason::LoopbackDown);
    }
    if let Some(port) = port_of(&inherited) {
        // The previous agent may not have done this.
        inherited.iter().for_each(defer);
        return Ok(ListenerSet { port, sockets: inherited });
    }
    // This thread is in the pod's namespace, so the range is the namespace's own.
    for port in ports::outside(&ports::ephemeral(), fastrand::u16(..)) {
        match pair(port) {
            Ok(sockets) => return Ok(ListenerSet { port, sockets }),
            Err(Errno::ADDRINUSE) => {}
            Err(error) => return Err(failed("bind")(error.into())),
        }
    }
    Err(NoListenerReason::NoPort)
}

fn failed(call: &'static str) -> impl Fn(io::Error) -> NoListenerReason {
    move |error| NoListenerReason::Failed { call, error: error.to_string() }
}

fn cookie_here() -> Result<u64, NoListenerReason> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|error| failed("socket")(error.into()))?;
    cookie_of(&socket).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOPROTOOPT) => NoListenerReason::Kernel,
        _ => failed("SO_NETNS_COOKIE")(error),
    })
}

/// The common port of `sockets`, if they are a complete set.
fn port_of(sockets: &[TcpListener]) -> Option<u16> {
    let mut addresses = sockets.iter().map(|socket| socket.local_addr().ok());
    let first = addresses.next()??;
    let rest: Vec<_> = addresses.collect::<Option<_>>()?;
    let is_set = first.is_ipv4() && rest.len() < 2 && rest.iter().all(SocketAddr::is_ipv6);
    (is_set && rest.iter().all(|other| other.port() == first.port())).then_some(first.port())
}

/// Opens listeners at `port` for both families, or for IPv4 alone where the namespace has no IPv6.
///
/// They have neither SO_REUSEADDR, which std's listeners have, nor SO_REUSEPORT, so that no other socket can share the
/// port.
fn pair(port: u16) -> Result<Vec<TcpListener>, Errno> {
    let mut sockets = vec![listener(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port).into())?];
    match listener(SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0).into()) {
        Ok(socket) => sockets.push(socket),
        // IPv6 is off, on the node or in this namespace.
        Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {}
        Err(error) => return Err(error),
    }
    Ok(sockets)
}

fn listener(address: SocketAddr) -> Result<TcpListener, Errno> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    bind(&socket, &address)?;
    defer(&socket);
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Sets `TCP_DEFER_ACCEPT`. The queue is this pod's own, so that silent connections harm no other pod. A failure only
/// costs speed.
fn defer(listener: &impl AsFd) {
    if let Err(error) = defer_accept(listener) {
        debug!(%error, "Setting TCP_DEFER_ACCEPT on a pod listener failed");
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, net::TcpStream, thread, time::Duration};

    use tokio::time::Instant;

    use super::*;

    #[test]
    fn only_a_whole_set_of_one_port_is_taken_over() {
        let v4 = || TcpListener::bind("127.0.0.1:0").unwrap();
        let v6 = |port| TcpListener::bind(("::1", port)).unwrap();
        let one = v4();
        let port = one.local_addr().unwrap().port();
        assert_eq!(port_of(&[]), None);
        assert_eq!(port_of(&[v6(0)]), None);
        assert_eq!(port_of(&[v4(), v4()]), None);
        let other = v6(0);
        let differs = other.local_addr().unwrap().port() != port;
        assert!(!differs || port_of(&[one.try_clone().unwrap(), other]).is_none());
        assert_eq!(port_of(&[one.try_clone().unwrap()]), Some(port));
        assert_eq!(port_of(&[one, v6(port)]), Some(port));
    }

    #[test]
    fn nobody_can_join_or_take_a_port_and_whoever_has_it_keeps_it() {
        let listener = listener((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        assert!(!sockopt::socket_reuseaddr(&listener).unwrap());
        assert!(!sockopt::socket_reuseport(&listener).unwrap());
        // std's listener has SO_REUSEADDR.
        for address in [address, (Ipv4Addr::UNSPECIFIED, address.port()).into()] {
            let error = TcpListener::bind(address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
        assert_eq!(pair(address.port()).unwrap_err(), Errno::ADDRINUSE);
    }

    #[test]
    fn a_connection_is_accepted_with_its_request_or_after_a_while_in_silence() {
        let listener = listener((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let connect = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = || match listener.accept() {
            Ok((stream, _)) => Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        };
        let accept = || {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(10) {
                if let Some(stream) = accepted() {
                    return stream;
                }
                thread::sleep(Duration::from_millis(5));
            }
            panic!("nothing to accept");
        };
        loop {
            let begun = Instant::now();
            let (silent, mut asking) = (connect(), connect());
            let early = accepted();
            asking.write_all(b"GET").unwrap();
            // The silent one's while is a second; on a machine that needs as long for this, nothing can be told.
            let quick = begun.elapsed() < Duration::from_millis(800);
            if !quick && early.is_some() {
                continue;
            }
            let both = [accept(), accept()].map(|stream| stream.peer_addr().unwrap());
            let ends = [&asking, &silent].map(|stream| stream.local_addr().unwrap());
            if quick {
                assert!(early.is_none(), "accepted before there is anything to read");
                assert_eq!(both, ends);
                break;
            }
        }
    }
}

//! Connections with the ends of another pod's on the node's network, from there.
//!
//! A socket that is bound to an interface once its ports are chosen is in the way of no other's choice, and with TCP
//! Fast Open its SYN is not sent before there is something to send. So there can be two for every port that another
//! pod's connection may have, and both speak up when that begins.

use std::{io, net::SocketAddr, ops::RangeInclusive, os::fd::AsFd as _};

use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::Socket;

use super::{
    Course, begin_connect,
    forge::{sight, source_of_syn},
    imds, socket,
};
use crate::pod_client::attack::sys::set_option;

/// Of Linux's `ip(7)` and `tcp(7)`; the crate does not have them.
const IP_LOCAL_PORT_RANGE: i32 = 51;
const TCP_FASTOPEN_NO_COOKIE: i32 = 34;
/// After a port's sockets have spoken, so many others do before new ones are made, which ends the old.
const LATER: usize = 16;

/// Waits with two sockets on each of `ports`, which are bound to two of the node's `interfaces`.
pub(super) fn run(
    course: &Course,
    listener: SocketAddr,
    ports: RangeInclusive<u16>,
    interfaces: &[String; 2],
) -> io::Result<()> {
    let sight = sight()?;
    let pair = |port| -> Vec<Socket> {
        let open = interfaces.iter().map(|interface| deferred(port, interface));
        open.filter_map(|socket| {
            socket.inspect_err(|error| course.count(&format!("not deferred: {error}"), 1)).ok()
        })
        .collect()
    };
    let mut waiting: Vec<Vec<Socket>> = ports.clone().map(pair).collect();
    let mut spent: Vec<u16> = Vec::new();
    course.in_full_swing();
    let mut packet = [0; 128];
    while course.goes_on() {
        // Spinning: who sleeps comes too late.
        let Ok((length, _)) = recv(&sight, &mut packet, RecvFlags::DONTWAIT) else { continue };
        let Some(source) = source_of_syn(&packet[..length], listener) else { continue };
        if !ports.contains(&source.port()) || spent.contains(&source.port()) {
            continue;
        }
        for socket in &waiting[usize::from(source.port() - ports.start())] {
            // That it is not connected yet is as it should be.
            let _ = send(socket, b"x", SendFlags::NOSIGNAL);
        }
        course.count("seen", 1);
        spent.push(source.port());
        if spent.len() > LATER {
            for port in spent.drain(..LATER / 2) {
                let place = &mut waiting[usize::from(port - ports.start())];
                place.clear();
                *place = pair(port);
            }
        }
    }
    Ok(())
}

/// A socket that has its ends, and sends nothing yet.
fn deferred(port: u16, interface: &str) -> io::Result<Socket> {
    let socket = socket()?;
    socket.set_reuse_address(true)?;
    set_option(&socket, libc::IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
    // Not by bind: the port would be no other's choice any more.
    let only = i32::from_ne_bytes((u32::from(port) << 16 | u32::from(port)).to_ne_bytes());
    set_option(&socket.as_fd(), libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, only)?;
    begin_connect(&socket, imds())?;
    socket.bind_device(Some(interface.as_bytes()))?;
    Ok(socket)
}

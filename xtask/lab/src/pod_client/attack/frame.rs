//! Packet sockets: they write to the interface, below IP and all that decides there.

use std::{fs, io, net::IpAddr};

use rustix::net::netdevice;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::{
    bytes,
    sys::{link_address, set_option},
};

/// The interface, in pods as on the node.
pub(in crate::pod_client) const INTERFACE: &str = "eth0";

/// The sort of packet socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// `SOCK_DGRAM`: the kernel writes the link's header.
    Dgram,
    /// `SOCK_RAW`: with a header of our own.
    Raw,
    /// `SOCK_RAW` with `PACKET_QDISC_BYPASS`: past traffic control too.
    RawBypass,
    /// `SOCK_RAW`, with a VLAN's tag.
    Tagged,
}

/// Sends a TCP SYN to port 80 of `to`, as from `from`, through the gateway on `interface`.
pub(super) fn send(way: Way, from: IpAddr, to: IpAddr, interface: Option<&str>) -> io::Result<()> {
    /// IEEE 802.1Q.
    const VLAN: u16 = 0x8100;
    let interface = interface.unwrap_or(INTERFACE);
    let inner = if to.is_ipv4() { libc::ETH_P_IP } else { libc::ETH_P_IPV6 } as u16;
    let kind = if way == Way::Dgram { Type::DGRAM } else { Type::RAW };
    let socket = Socket::new(Domain::PACKET, kind, None)?;
    if way == Way::RawBypass {
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)?;
    }
    let protocol = if way == Way::Tagged { VLAN } else { inner };
    let gateway = gateway(interface)?;
    let mut packet = bytes::with_ip_header(from, to, &bytes::syn(from, to));
    if way == Way::Tagged {
        packet.splice(0..0, [[0, 0], inner.to_be_bytes()].concat());
    }
    if way != Way::Dgram {
        packet.splice(0..0, ethernet(interface, gateway, protocol));
    }
    let index = netdevice::name_to_index(&socket, interface)?;
    socket.send_to(&packet, &link_address(index, gateway, protocol))?;
    Ok(())
}

fn ethernet(interface: &str, to: [u8; 6], protocol: u16) -> Vec<u8> {
    let own = fs::read_to_string(format!("/sys/class/net/{interface}/address"));
    // /sys shows the mounter's namespace; a station of our own making does as well.
    let own = own.ok().and_then(|text| mac(text.trim())).unwrap_or([2, 0, 0, 0, 0, 1]);
    [to.as_slice(), &own, &protocol.to_be_bytes()].concat()
}

/// The neighbour on `interface` that everything goes through, or all stations where none is known yet.
fn gateway(interface: &str) -> io::Result<[u8; 6]> {
    let table = fs::read_to_string("/proc/thread-self/net/arp")?;
    let mut known = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, _, address, _, device] = fields[..] else { return None };
        if device == interface { mac(address) } else { None }
    });
    Ok(known.find(|mac| mac != &[0; 6]).unwrap_or([0xff; 6]))
}

pub(in crate::pod_client) fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stations_are_read_as_the_kernel_writes_them() {
        assert_eq!(mac("ee:ee:ee:0a:00:01"), Some([0xee, 0xee, 0xee, 0x0a, 0, 1]));
        assert_eq!(mac("ee:ee"), None);
        assert_eq!(mac("HW address"), None);
    }
}

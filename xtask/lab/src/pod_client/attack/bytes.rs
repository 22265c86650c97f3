//! Packets made by hand: a TCP SYN and an ICMP echo request, with the IP header where the socket wants one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::TOS;

/// The port that hand-made segments say they come from.
const SOURCE_PORT: u16 = 45_678;
const TTL: u8 = 64;

/// A TCP SYN to port 80 of `to`, without an IP header.
pub(super) fn syn(from: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut segment = vec![0; 20];
    segment[0..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
    segment[2..4].copy_from_slice(&80_u16.to_be_bytes());
    segment[4..8].copy_from_slice(&0x6b69_616d_u32.to_be_bytes());
    // Five words of header, SYN, a window of 64,240.
    segment[12] = 5 << 4;
    segment[13] = 0x02;
    segment[14..16].copy_from_slice(&64_240_u16.to_be_bytes());
    let sum = pseudo_checksum(from, to, libc::IPPROTO_TCP as u8, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// An echo request, of ICMP or ICMPv6 as `to` is.
pub(in crate::pod_client) fn echo(from: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut message = vec![0; 16];
    message[0] = if to.is_ipv4() { 8 } else { 128 };
    message[8..].copy_from_slice(b"kiam-lab");
    let sum = match to {
        IpAddr::V4(_) => checksum(&message),
        IpAddr::V6(_) => pseudo_checksum(from, to, libc::IPPROTO_ICMPV6 as u8, &message),
    };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// `payload` behind an IP header of the addresses' family. Both must be of one.
pub(super) fn with_ip_header(from: IpAddr, to: IpAddr, payload: &[u8]) -> Vec<u8> {
    let mut packet = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => header_v4(from, to, payload.len()),
        (IpAddr::V6(from), IpAddr::V6(to)) => header_v6(from, to, payload.len()),
        _ => Vec::new(),
    };
    packet.extend_from_slice(payload);
    packet
}

fn header_v4(from: Ipv4Addr, to: Ipv4Addr, length: usize) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[0] = 0x45;
    header[1] = TOS;
    header[2..4].copy_from_slice(&(20 + length as u16).to_be_bytes());
    header[8] = TTL;
    header[9] = libc::IPPROTO_TCP as u8;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn header_v6(from: Ipv6Addr, to: Ipv6Addr, length: usize) -> Vec<u8> {
    let mut header = vec![0; 40];
    header[0] = 0x60;
    header[4..6].copy_from_slice(&(length as u16).to_be_bytes());
    header[6] = libc::IPPROTO_TCP as u8;
    header[7] = TTL;
    header[8..24].copy_from_slice(&from.octets());
    header[24..40].copy_from_slice(&to.octets());
    header
}

fn pseudo_checksum(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for address in [from, to] {
        match address {
            IpAddr::V4(address) => bytes.extend_from_slice(&address.octets()),
            IpAddr::V6(address) => bytes.extend_from_slice(&address.octets()),
        }
    }
    bytes.extend_from_slice(&[0, protocol]);
    bytes.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    bytes.extend_from_slice(payload);
    checksum(&bytes)
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_rfc() {
        // RFC 1071, section 3: the sum of these is ddf2.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        let (from, to): (IpAddr, IpAddr) = ([10, 77, 1, 2].into(), [169, 254, 169, 254].into());
        // A header or a message with its own checksum sums up to zero.
        assert_eq!(checksum(&with_ip_header(from, to, &[])), 0);
        assert_eq!(checksum(&echo(from, to)), 0);
        assert_eq!(pseudo_checksum(from, to, 6, &syn(from, to)), 0);
    }
}

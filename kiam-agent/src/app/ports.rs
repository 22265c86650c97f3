//! Ports that nobody is given by chance.
//!
//! The kernel takes the source ports of connections, and the ports of sockets that listen without asking for one,
//! from the ephemeral range. Were the agent's port among them, a process of the node could hold it, unasked, at the
//! moment when a new agent wants it.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    ops::RangeInclusive,
};

use tracing::warn;

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// Linux's own, where the node's can't be read.
const DEFAULT: RangeInclusive<u16> = 32_768..=60_999;
/// The first port that needs no privilege.
const UNPRIVILEGED: u16 = 1024;
const TRIES: usize = 64;

/// Listens at `address`; for port 0, at one that is free and not ephemeral.
///
/// # Errors
///
/// Those of bind(2).
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    if address.port() != 0 {
        let ephemeral = ephemeral();
        if is_ephemeral(address.port(), &ephemeral) {
            warn!(
                port = address.port(), range = ?ephemeral,
                "The port is one that the kernel gives away: choose another, or add it to net.ipv4.ip_local_reserved_ports"
            );
        }
        return TcpListener::bind(address);
    }
    let ephemeral = ephemeral();
    for _ in 0..TRIES {
        let port = fastrand::u16(UNPRIVILEGED..);
        if ephemeral.contains(&port) {
            continue;
        }
        match TcpListener::bind(SocketAddr::new(address.ip(), port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound,
        }
    }
    // Nearly every port is ephemeral on this node.
    TcpListener::bind(address)
}

fn ephemeral() -> RangeInclusive<u16> {
    fs::read_to_string(RANGE).ok().and_then(|text| parse_range(&text)).unwrap_or(DEFAULT)
}

fn is_ephemeral(port: u16, ephemeral: &RangeInclusive<u16>) -> bool {
    let reserved = fs::read_to_string(RESERVED).unwrap_or_default();
    ephemeral.contains(&port) && !is_reserved(&reserved, port)
}

/// Two numbers, as the kernel writes them.
fn parse_range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

/// Whether `list` (`3100,8080-8090`) has `port`.
fn is_reserved(list: &str, port: u16) -> bool {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse::<u16>().ok()?)
    });
    ranges.into_iter().any(|range| range.contains(&port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_spellings_are_understood() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(parse_range("1024 65535"), Some(1024..=65_535));
        assert_eq!(parse_range("\n"), None);
        let list = "3100,8080-8090\n";
        for (port, expected) in [(3100, true), (8085, true), (8091, false), (0, false)] {
            assert_eq!(is_reserved(list, port), expected, "{port}");
        }
        assert!(!is_reserved("\n", 3100));
    }

    #[test]
    fn a_port_of_the_agents_choice_is_not_ephemeral() {
        for _ in 0..50 {
            let socket = listen(([127, 0, 0, 1], 0).into()).unwrap();
            let port = socket.local_addr().unwrap().port();
            assert!(port >= UNPRIVILEGED && !ephemeral().contains(&port), "{port}");
        }
    }
}

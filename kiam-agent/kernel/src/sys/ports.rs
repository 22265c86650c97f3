//! Ports that the kernel gives to nobody by chance.
//!
//! The kernel takes the source ports of connections, and the ports of sockets that listen without asking for one,
//! from the ephemeral range. If the agent's port were in that range, a process could hold it by chance at the moment
//! when a new agent needs it.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener},
    ops::RangeInclusive,
};

use tracing::warn;

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// What `ip_local_port_range` is by default.
const DEFAULT: RangeInclusive<u16> = 32_768..=60_999;
/// The first port that needs no privilege.
const UNPRIVILEGED: u16 = 1024;
/// Ports that are tried on either side of the range.
const TRIES: usize = 64;
/// Ports for where the range leaves none of the unprivileged ones: IANA has assigned them to nobody, and the agent may
/// bind them.
const UNASSIGNED: RangeInclusive<u16> = 914..=952;

/// Listens at `address`; for port 0, at a free port outside the ephemeral range.
///
/// # Errors
///
/// Those of bind(2).
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let ephemeral = ephemeral();
    if address.port() != 0 {
        if is_ephemeral(address.port(), &ephemeral) {
            warn!(
                port = address.port(), range = ?ephemeral,
                "The port is in the kernel's ephemeral range: choose another, or add it to net.ipv4.ip_local_reserved_ports"
            );
        }
        return TcpListener::bind(address);
    }
    for port in outside(&ephemeral, fastrand::u16(..)) {
        match TcpListener::bind(SocketAddr::new(address.ip(), port)) {
            // In use, or below 1024 and not this user's.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied
                ) => {}
            bound => return bound,
        }
    }
    // Nearly every port is ephemeral on this node.
    TcpListener::bind(address)
}

/// The ephemeral range of this thread's network namespace.
pub(crate) fn ephemeral() -> RangeInclusive<u16> {
    fs::read_to_string(RANGE).ok().and_then(|text| parse_range(&text)).unwrap_or(DEFAULT)
}

/// Ports outside `range`, in the order in which they are tried: from somewhere above it, where hardly anything
/// listens, then from below it downwards, then those that nobody uses.
pub(crate) fn outside(
    range: &RangeInclusive<u16>,
    start: u16,
) -> impl Iterator<Item = u16> + use<> {
    let (low, high) = (*range.start(), *range.end());
    let first = high.saturating_add(1).max(UNPRIVILEGED);
    let count = if high == u16::MAX { 0 } else { u16::MAX - first + 1 };
    let above = (0..count).map(move |n| {
        let step = (u32::from(start) + u32::from(n)) % u32::from(count);
        // Less than `count`, so the sum is a port.
        first + step as u16
    });
    let below = (UNPRIVILEGED..low.max(UNPRIVILEGED)).rev();
    let unassigned = UNASSIGNED.filter(move |port| !(low..=high).contains(port));
    above.take(TRIES).chain(below.take(TRIES)).chain(unassigned)
}

/// Whether a socket may get `port` of the range by chance: it is in it, and not reserved.
pub(crate) fn is_ephemeral(port: u16, ephemeral: &RangeInclusive<u16>) -> bool {
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
    fn ports_are_outside_the_range_and_nobodys() {
        let cases = [
            (32768..=60999, 61000..=65535, 2 * TRIES + 39),
            (1024..=65535, 914..=914, 39),
            (950..=65535, 914..=914, 36),
            (1..=65535, 0..=0, 0),
            (1025..=65535, 1024..=1024, 1 + 39),
            (1..=500, 1024..=65535, TRIES + 39),
            (0..=65534, 65535..=65535, 1),
            (20000..=65535, 1024..=19999, TRIES + 39),
        ];
        for (range, first, count) in cases {
            for start in [0, 1, 4535, 4536, 61000, u16::MAX] {
                let ports: Vec<u16> = outside(&range, start).collect();
                assert_eq!(ports.len(), count, "{range:?}");
                assert!(ports.first().is_none_or(|port| first.contains(port)), "{range:?}");
                let allowed = |port: &u16| {
                    (*port >= UNPRIVILEGED || UNASSIGNED.contains(port)) && !range.contains(port)
                };
                assert!(ports.iter().all(allowed), "{range:?} from {start}: {ports:?}");
                let mut once = ports.clone();
                once.sort_unstable();
                once.dedup();
                assert_eq!(once.len(), ports.len(), "{range:?}");
            }
        }
    }

    #[test]
    fn the_kernels_spellings_are_understood() {
        assert_eq!(parse_range("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(parse_range("1024 65535"), Some(1024..=65_535));
        for text in ["", "\n", "1", "a b", "1 65536"] {
            assert_eq!(parse_range(text), None, "{text:?}");
        }
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

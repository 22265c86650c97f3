//! The node's current addresses, read from the kernel.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;

use kiam_core::pods;

/// The shortest time between two reads.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest use of an address without another read.
const BELIEVED: Duration = Duration::from_secs(60);

/// The addresses of the interfaces in this network namespace, which is the node's.
#[derive(Debug, Default)]
pub struct InterfaceAddresses(Mutex<Option<AddressList>>);

/// The addresses, with the time of the read.
#[derive(Debug)]
struct AddressList {
    at: Instant,
    addresses: HashSet<IpAddr>,
}

// === impl InterfaceAddresses ===

impl pods::NodeAddresses for InterfaceAddresses {
    fn contains(&self, address: IpAddr) -> bool {
        self.contained(address, Instant::now())
    }
}

impl InterfaceAddresses {
    fn contained(&self, address: IpAddr, now: Instant) -> bool {
        let address = address.to_canonical();
        if address.is_loopback() {
            return true;
        }
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listed) = &*held {
            let age = now.saturating_duration_since(listed.at);
            let known = listed.addresses.contains(&address);
            if age < PAUSE || (known && age < BELIEVED) {
                return known;
            }
        }
        let listed = AddressList { at: now, addresses: interfaces() };
        held.insert(listed).addresses.contains(&address)
    }
}

/// All addresses of all interfaces; none after an error, so that no address is trusted.
pub(crate) fn interfaces() -> HashSet<IpAddr> {
    let addresses = match nix::ifaddrs::getifaddrs() {
        Ok(interfaces) => interfaces.filter_map(|interface| interface.address),
        Err(error) => {
            warn!(%error, "The node's addresses can't be read; requests of hostNetwork pods are rejected");
            return HashSet::new();
        }
    };
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
    };
    addresses.filter_map(ip).collect()
}

#[cfg(test)]
mod tests {
    use lab::Netns;

    use super::*;

    #[test]
    fn addresses_that_come_and_go_are_noticed() {
        if lab::skip!() {
            return;
        }
        let netns = Netns::create().unwrap();
        netns.ip("link set lo up").unwrap();
        let node = InterfaceAddresses::default();
        let begun = Instant::now();
        let has = |text: &str, after| {
            let address = text.parse().unwrap();
            // The kernel answers for the namespace of the thread that asks.
            netns.enter(|| node.contained(address, begun + after)).unwrap()
        };
        assert!(["127.0.0.1", "127.9.9.9", "::1"].iter().all(|own| has(own, Duration::ZERO)));
        assert!(!has("192.0.2.7", Duration::ZERO));
        netns.ip("address add 192.0.2.7/32 dev lo\naddress add fd00::7/128 dev lo").unwrap();
        let soon = PAUSE.checked_sub(Duration::from_millis(1)).unwrap();
        assert!(!has("192.0.2.7", soon), "the kernel is asked once a second at most");
        for address in ["192.0.2.7", "::ffff:192.0.2.7", "fd00::7"] {
            assert!(has(address, PAUSE), "{address}");
        }
        assert!(!has("192.0.2.8", PAUSE) && !has("fd00::8", PAUSE));
        netns.ip("address del 192.0.2.7/32 dev lo").unwrap();
        assert!(!has("192.0.2.7", PAUSE + BELIEVED));
    }
}

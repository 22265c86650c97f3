//! The self-test's connections, as the accept loops see them.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::intercept::FlowEntry;

/// A witness of the self-test's connections, where pods are identified, so that the whole path is tested. Cheap to clone;
/// the accept loops' resolver and the self-test share one.
#[derive(Clone, Debug, Default)]
pub struct Witness(Arc<Mutex<WitnessState>>);

#[derive(Debug, Default)]
struct WitnessState {
    /// The self-test's client; `None` while there is none.
    client: Option<TestClient>,
    /// The client's connections by source port, with the kernel's entry if entries are looked up.
    arrived: HashMap<u16, Option<FlowEntry>>,
}

/// The self-test's client, as the witness recognises it.
#[derive(Clone, Debug)]
pub(super) struct TestClient {
    /// The client's cgroup.
    pub(super) cgroup: u64,
    /// The network namespace's cookie, from kernel 5.14 on.
    pub(super) netns: Option<u64>,
    /// The client's addresses.
    pub(super) addresses: [IpAddr; 2],
}

// === impl Witness ===

impl Witness {
    /// Whether the connection from `peer` with this entry is the self-test's. Such a connection is recorded and closed.
    #[must_use]
    pub fn saw(&self, entry: FlowEntry, peer: SocketAddr) -> bool {
        self.is_client(peer, Some(entry), |client| client.cgroup == entry.cgroup)
    }

    /// As [`Witness::saw`], where callers are identified by address.
    #[must_use]
    pub fn saw_address(&self, peer: SocketAddr) -> bool {
        let address = peer.ip().to_canonical();
        self.is_client(peer, None, |client| client.addresses.contains(&address))
    }

    /// The network namespace of the self-test, if `address` is the self-test's.
    #[must_use]
    pub fn namespace(&self, address: IpAddr) -> Option<u64> {
        let seen = self.lock();
        seen.client.as_ref().filter(|client| client.addresses.contains(&address))?.netns
    }

    /// Forgets the recorded connections, and watches for those of `client`.
    pub(super) fn watch(&self, client: Option<TestClient>) {
        *self.lock() = WitnessState { client, arrived: HashMap::new() };
    }

    /// The recorded connection from `port`: its entry, if entries are looked up.
    pub(super) fn arrived(&self, port: u16) -> Option<Option<FlowEntry>> {
        self.lock().arrived.get(&port).copied()
    }

    fn is_client(
        &self,
        peer: SocketAddr,
        entry: Option<FlowEntry>,
        is_its: impl Fn(&TestClient) -> bool,
    ) -> bool {
        let mut seen = self.lock();
        let its = seen.client.as_ref().is_some_and(is_its);
        if its {
            seen.arrived.insert(peer.port(), entry);
        }
        its
    }

    fn lock(&self) -> MutexGuard<'_, WitnessState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn only_the_self_tests_cgroup_or_address_is_the_self_test() {
        let witness = Witness::default();
        let own = Ipv4Addr::new(169, 254, 76, 2);
        let peer = SocketAddr::from((own, 4000));
        let entry = FlowEntry { cgroup: 7, netns: 3, socket: 9, on_host: false };
        assert!(!witness.saw(entry, peer) && !witness.saw_address(peer), "before there is one");
        let addresses = [own.into(), Ipv6Addr::LOCALHOST.into()];
        witness.watch(Some(TestClient { cgroup: 7, netns: Some(3), addresses }));
        assert!(witness.saw(entry, peer));
        assert!(!witness.saw(FlowEntry { cgroup: 8, ..entry }, peer));
        assert!(witness.saw_address((own.to_ipv6_mapped(), 4001).into()));
        assert!(!witness.saw_address(([169, 254, 76, 3], 4002).into()));
        assert_eq!(witness.namespace(own.into()), Some(3));
        assert_eq!(witness.namespace(Ipv4Addr::LOCALHOST.into()), None);
        assert_eq!(witness.arrived(4000), Some(Some(entry)));
        assert_eq!((witness.arrived(4001), witness.arrived(4002)), (Some(None), None));
        witness.watch(None);
        assert!(!witness.saw(entry, peer));
        assert_eq!(witness.arrived(4000), None);
    }
}

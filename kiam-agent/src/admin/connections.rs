//! The connections to one listener for operators: a share for each source, and always room for a new one.
//!
//! Whoever can reach a listener can hold connections to it. So a new connection ends an old one when its source has used
//! its share, or the listener is full. It ends one of the source with the most connections, first those without a
//! request, and of these the oldest. So no source can block the operators' own scrapes and probes.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::task::AbortHandle;

/// The most connections to one listener. Each takes memory and an open file.
pub(super) const CONNECTIONS: usize = 64;
/// The most connections of one source.
pub(super) const SHARE: usize = 8;

/// The source of a TCP connection. All addresses of the node's loopback, or of an IPv6 /64 network, are one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PeerSource(IpAddr);

/// The open connections, in the order of acceptance.
#[derive(Debug)]
pub(super) struct Connections<S> {
    share: usize,
    table: Arc<Mutex<Table<S>>>,
}

#[derive(Debug)]
struct Table<S> {
    /// A logical clock that counts events.
    now: u64,
    open: HashMap<u64, OpenConnection<S>>,
}

#[derive(Debug)]
struct OpenConnection<S> {
    source: S,
    /// The time of the last request.
    asked: Option<u64>,
    task: Option<AbortHandle>,
}

/// An open connection's entry in the table, until it is dropped.
#[derive(Debug)]
pub(super) struct ConnectionGuard<S> {
    accepted: u64,
    table: Arc<Mutex<Table<S>>>,
}

// === impl PeerSource ===

impl From<IpAddr> for PeerSource {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(v4) if v4.is_loopback() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
            v4 @ IpAddr::V4(_) => v4,
        })
    }
}

// === impl Connections ===

impl<S: Copy + Eq + Hash> Connections<S> {
    /// No connections, of which one source may have `share`.
    pub(super) fn new(share: usize) -> Self {
        let table = Table { now: 0, open: HashMap::new() };
        Self { share, table: Arc::new(Mutex::new(table)) }
    }

    /// Admits a connection of `source`, and ends another one if there is no room.
    pub(super) fn admit(&self, source: S) -> ConnectionGuard<S> {
        let mut table = lock(&self.table);
        let ended = table.victim(source, self.share).and_then(|id| table.open.remove(&id));
        let accepted = table.tick();
        table.open.insert(accepted, OpenConnection { source, asked: None, task: None });
        drop(table);
        if let Some(task) = ended.and_then(|open| open.task) {
            task.abort();
        }
        ConnectionGuard { accepted, table: self.table.clone() }
    }

    /// Sets the task that serves a connection, which may have ended already.
    pub(super) fn served_by(&self, accepted: u64, task: AbortHandle) {
        if let Some(open) = lock(&self.table).open.get_mut(&accepted) {
            open.task = Some(task);
        }
    }
}

// === impl Table ===

impl<S: Copy + Eq + Hash> Table<S> {
    /// The connection that has to end for a new one of `source`.
    fn victim(&self, source: S, share: usize) -> Option<u64> {
        let mut counts: HashMap<S, usize> = HashMap::new();
        for open in self.open.values() {
            *counts.entry(open.source).or_default() += 1;
        }
        let most = counts.values().copied().max().unwrap_or_default();
        let is_full = self.open.len() >= CONNECTIONS;
        let has_share = counts.get(&source).is_some_and(|count| *count >= share);
        let ends = |open: &OpenConnection<S>| match has_share {
            true => open.source == source,
            false => is_full && counts.get(&open.source) == Some(&most),
        };
        let candidates = self.open.iter().filter(|(_, open)| ends(open));
        candidates.min_by_key(|(accepted, open)| (open.asked, **accepted)).map(|(id, _)| *id)
    }
}

impl<S> Table<S> {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }
}

// === impl ConnectionGuard ===

impl<S> ConnectionGuard<S> {
    /// The connection's number.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Records a request on the connection.
    pub(super) fn asks(&self) {
        let mut table = lock(&self.table);
        let now = table.tick();
        if let Some(open) = table.open.get_mut(&self.accepted) {
            open.asked = Some(now);
        }
    }
}

impl<S> Drop for ConnectionGuard<S> {
    fn drop(&mut self) {
        lock(&self.table).open.remove(&self.accepted);
    }
}

fn lock<S>(table: &Mutex<Table<S>>) -> MutexGuard<'_, Table<S>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(
        connections: &Connections<u8>,
        sources: impl IntoIterator<Item = u8>,
    ) -> Vec<ConnectionGuard<u8>> {
        sources.into_iter().map(|source| connections.admit(source)).collect()
    }

    fn is_open(guard: &ConnectionGuard<u8>) -> bool {
        lock(&guard.table).open.contains_key(&guard.accepted)
    }

    #[test]
    fn addresses_of_one_host_are_one_source() {
        let source = |text: &str| PeerSource::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(source("127.0.0.1"), source("127.9.8.7"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
        assert_eq!(source("fd00::1"), source("fd00::ffff:1"));
        assert_ne!(source("fd00::1"), source("fd00:0:0:1::1"));
        assert_ne!(source("10.0.0.1"), source("10.0.0.2"));
    }

    #[test]
    fn a_source_beyond_its_share_ends_its_own_oldest_that_asks_for_nothing() {
        let connections = Connections::new(3);
        let other = connections.admit(9);
        let places = admitted(&connections, [1, 1, 1]);
        places[0].asks();
        let _fourth = connections.admit(1);
        assert_eq!(places.iter().map(is_open).collect::<Vec<_>>(), [true, false, true]);
        places[2].asks();
        lock(&connections.table)
            .open
            .values_mut()
            .for_each(|open| open.asked = open.asked.or(Some(99)));
        let _fifth = connections.admit(1);
        assert!(!is_open(&places[0]) && is_open(&places[2]), "the one that asked first");
        assert!(is_open(&other));
    }

    #[test]
    fn a_full_listener_ends_one_of_the_source_that_has_most() {
        let connections = Connections::new(SHARE);
        let scrape = connections.admit(200);
        let many = admitted(&connections, (0..8).flat_map(|source| [source; 7]));
        let few = admitted(&connections, 100..107);
        assert_eq!(1 + many.len() + few.len(), CONNECTIONS);
        let _new = connections.admit(201);
        assert!(is_open(&scrape) && few.iter().all(is_open) && !is_open(&many[0]));
        assert_eq!(many.iter().filter(|guard| is_open(guard)).count(), many.len() - 1);
    }

    #[test]
    fn what_has_ended_leaves_its_place() {
        let connections = Connections::new(2);
        drop(admitted(&connections, [1, 1, 2]));
        assert!(lock(&connections.table).open.is_empty());
    }
}

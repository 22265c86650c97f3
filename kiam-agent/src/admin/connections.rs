//! The connections to one listener for operators: a share for each source, and always room for a new one.
//!
//! Whoever can reach a listener can hold connections to it. A new connection therefore ends an old one, once its source
//! has its share or the listener is full: one of the source that has most, first those that have asked for nothing, and
//! of these the oldest. So nobody keeps the operators' own scrape or probe out.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::task::AbortHandle;

/// Connections to one listener at once. Each takes memory and an open file from the agent.
pub(super) const CONNECTIONS: usize = 64;
/// Of these, those of one source.
pub(super) const SHARE: usize = 8;

/// Whoever connects over TCP. Any number of addresses of the node's loopback, and of an IPv6 network, are one host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PeerSource(IpAddr);

/// The connections that are open, by when they were accepted.
#[derive(Debug)]
pub(super) struct Connections<S> {
    share: usize,
    table: Arc<Mutex<Table<S>>>,
}

#[derive(Debug)]
struct Table<S> {
    /// Counts what happens, as a clock.
    now: u64,
    open: HashMap<u64, OpenConnection<S>>,
}

#[derive(Debug)]
struct OpenConnection<S> {
    source: S,
    /// When it last asked for something.
    asked: Option<u64>,
    task: Option<AbortHandle>,
}

/// A connection's guard among the others, until it is dropped.
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
    /// None, of which one source may have `share`.
    pub(super) fn new(share: usize) -> Self {
        let table = Table { now: 0, open: HashMap::new() };
        Self { share, table: Arc::new(Mutex::new(table)) }
    }

    /// A guard for a connection of `source`; ends another one where there is none.
    pub(super) fn admit(&self, source: S) -> ConnectionGuard<S> {
        let mut table = lock(&self.table);
        let ended = table.in_the_way(source, self.share).and_then(|id| table.open.remove(&id));
        let accepted = table.tick();
        table.open.insert(accepted, OpenConnection { source, asked: None, task: None });
        drop(table);
        if let Some(task) = ended.and_then(|open| open.task) {
            task.abort();
        }
        ConnectionGuard { accepted, table: self.table.clone() }
    }

    /// What serves the connection at a guard; it may have ended.
    pub(super) fn served_by(&self, accepted: u64, task: AbortHandle) {
        if let Some(open) = lock(&self.table).open.get_mut(&accepted) {
            open.task = Some(task);
        }
    }
}

// === impl Table ===

impl<S: Copy + Eq + Hash> Table<S> {
    /// The connection that has to end for one of `source`.
    fn in_the_way(&self, source: S, share: usize) -> Option<u64> {
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
    /// Which one it is.
    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// The connection asks for something.
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

//! The kernel's records of connections and the processes that opened them.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aya::maps::{HashMap, MapData, MapError};
use kiam_common::client::{CallingProcess as ProcessRecord, ConnectionCount, FlowKey, Opener};

use crate::sys::since_boot;
use kiam_core::pods::{CallingProcess, Comm};

/// A connection is accepted within this time after its connect(2), or has been given up: a SYN is sent again for two minutes
/// (`tcp_syn_retries`).
const ACCEPTED_WITHIN: Duration = Duration::from_secs(300);

/// The opener of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// The leaf cgroup of the process that called connect.
    pub cgroup: u64,
    /// The cookie of the network namespace that it was opened in.
    pub netns: u64,
    /// The cookie of its socket.
    pub socket: u64,
    /// Whether the namespace is the node's own.
    pub on_host: bool,
}

/// The kernel's map of connections; cheap to clone.
#[derive(Clone, Debug)]
pub struct Flows(Arc<Mutex<Maps>>);

#[derive(Debug)]
struct Maps {
    flows: HashMap<MapData, FlowKey, Opener>,
    pods: ConnectionCounts,
    processes: HashMap<MapData, u64, ProcessRecord>,
}

/// The connection counts of pods, by cgroup.
#[derive(Debug)]
struct ConnectionCounts {
    counts: HashMap<MapData, u64, ConnectionCount>,
    /// The pods without open connections at the last sweep, with the number of connections opened so far.
    idle: HashSet<(u64, i64)>,
}

// === impl Flows ===

impl Flows {
    pub(super) fn new(
        flows: HashMap<MapData, FlowKey, Opener>,
        pods: HashMap<MapData, u64, ConnectionCount>,
        mut processes: HashMap<MapData, u64, ProcessRecord>,
    ) -> Self {
        remove_stale(&mut processes, since_boot());
        let pods = ConnectionCounts { counts: pods, idle: HashSet::new() };
        Self(Arc::new(Mutex::new(Maps { flows, pods, processes })))
    }

    /// The process that connected the socket with the cookie `socket`. `None` once the socket is closed, where the map was
    /// full, and of connections that an older release's programs have recorded.
    #[must_use]
    pub fn process(&self, socket: u64) -> Option<CallingProcess> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ProcessRecord { process, thread, connected_ns, comm } =
            maps.processes.get(&socket, 0).ok()?;
        let connected = Duration::from_nanos(connected_ns);
        Some(CallingProcess { pid: process, thread, connected, comm: Comm::new(comm) })
    }

    /// Removes and returns the entry of the connection from `peer` to `local`, if it was opened in the network namespace
    /// `netns`.
    ///
    /// # Errors
    ///
    /// The kernel's, if the map can't be read. A missing entry is no error.
    pub fn take(
        &self,
        netns: u64,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<FlowEntry>, MapError> {
        self.take_entry(key(netns, peer, local))
    }

    /// The entry of the connection from `peer` to `local`, which was opened in the network namespace `netns`. It stays until
    /// the opener's socket closes. Until then no other connection in the namespace has these ends.
    ///
    /// # Errors
    ///
    /// As [`Flows::take`].
    pub fn find(
        &self,
        netns: u64,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<FlowEntry>, MapError> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.find(&key(netns, peer, local))
    }

    /// Removes and returns the entry of the filter of SYNs: the last connection with these ends, in any namespace. Any pod
    /// can write it with another pod's address, so that it proves nothing.
    ///
    /// # Errors
    ///
    /// As [`Flows::take`].
    pub fn take_last(
        &self,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<FlowEntry>, MapError> {
        self.take_entry(key(0, peer, local))
    }

    fn take_entry(&self, key: FlowKey) -> Result<Option<FlowEntry>, MapError> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = maps.find(&key)?;
        if found.is_some() {
            // The socket may have been closed meanwhile.
            let _ = maps.flows.remove(&key);
        }
        Ok(found)
    }

    /// Forgets pods without open connections, and without new ones since the last sweep.
    pub fn sweep(&self) {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.pods.sweep();
    }
}

// === impl Maps ===

impl Maps {
    fn find(&self, key: &FlowKey) -> Result<Option<FlowEntry>, MapError> {
        match self.flows.get(key, 0) {
            Ok(Opener { cgroup, netns, socket, on_host, .. }) => {
                Ok(Some(FlowEntry { cgroup, netns, socket, on_host: on_host != 0 }))
            }
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

// === impl ConnectionCounts ===

impl ConnectionCounts {
    fn sweep(&mut self) {
        let counts = self.counts.iter().flatten().filter(|(_, counts)| counts.open <= 0);
        let idle: HashSet<(u64, i64)> = counts.map(|(key, counts)| (key, counts.opened)).collect();
        for (key, _) in idle.intersection(&self.idle) {
            // It may be gone already.
            let _ = self.counts.remove(key);
        }
        self.idle = idle;
    }
}

/// Removes the records of connections that were opened long before `now`. Those that are open have been accepted, and their
/// record was read then. The others closed while an older release's programs ran, which remove no records.
fn remove_stale(processes: &mut HashMap<MapData, u64, ProcessRecord>, now: Duration) {
    let opened_before = now.saturating_sub(ACCEPTED_WITHIN);
    let is_stale =
        |record: &ProcessRecord| Duration::from_nanos(record.connected_ns) < opened_before;
    let records = processes.iter().flatten();
    let stale: Vec<u64> =
        records.filter(|(_, record)| is_stale(record)).map(|(socket, _)| socket).collect();
    for socket in stale {
        // It may be gone already.
        let _ = processes.remove(&socket);
    }
}

fn key(netns: u64, peer: SocketAddr, local: SocketAddr) -> FlowKey {
    FlowKey {
        netns,
        source: mapped(peer.ip()),
        destination: mapped(local.ip()),
        source_port_be: peer.port().to_be(),
        destination_port_be: local.port().to_be(),
        pad: 0,
    }
}

/// IPv4 in the v4-mapped form that the kernel's entries have.
fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use aya::maps::Map;

    use super::*;
    use crate::sys::batch::tests::hash_map;

    #[test]
    fn records_that_an_older_releases_programs_left_are_removed() {
        if lab::skip!() {
            return;
        }
        let map = MapData::from_fd(hash_map(8, 32)).unwrap();
        let mut processes = HashMap::try_from(Map::HashMap(map)).unwrap();
        let now = Duration::from_secs(7200);
        for (socket, age) in [(1, 7200), (2, 3600), (3, 301), (4, 299), (5, 0)] {
            let connected = now - Duration::from_secs(age);
            let connected_ns = u64::try_from(connected.as_nanos()).unwrap();
            let record = ProcessRecord { connected_ns, ..ProcessRecord::default() };
            processes.insert(socket, record, 0).unwrap();
        }
        remove_stale(&mut processes, now);
        let mut left: Vec<u64> = processes.keys().flatten().collect();
        left.sort_unstable();
        assert_eq!(left, [4, 5]);
    }
}

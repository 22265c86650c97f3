//! The kernel's record of who opened which connection.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, MapData, MapError};
use kiam_common::client::{FlowKey, Held, Opener};

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// Leaf cgroup of the process that called connect.
    pub cgroup: u64,
    /// Cookie of the network namespace it was opened in.
    pub netns: u64,
    /// Whether that is the node's own.
    pub on_host: bool,
}

/// Looks up connections; cheap to clone.
#[derive(Clone, Debug)]
pub struct Flows(Arc<Mutex<Maps>>);

#[derive(Debug)]
struct Maps {
    flows: HashMap<MapData, FlowKey, Opener>,
    pods: Holders,
}

/// Which pods have connections, by cgroup.
#[derive(Debug)]
struct Holders {
    held: HashMap<MapData, u64, Held>,
    /// Those that had nothing open when last swept, with how many they had opened.
    idle: HashSet<(u64, i64)>,
}

// === impl Flows ===

impl Flows {
    pub(super) fn new(
        flows: HashMap<MapData, FlowKey, Opener>,
        pods: HashMap<MapData, u64, Held>,
    ) -> Self {
        let pods = Holders { held: pods, idle: HashSet::new() };
        Self(Arc::new(Mutex::new(Maps { flows, pods })))
    }

    /// Takes the entry of the connection from `peer` to `local` out of the map, if it was opened in the
    /// network namespace `netns`.
    ///
    /// # Errors
    ///
    /// The kernel's, when the map can't be read; a missing entry is no error.
    pub fn take(
        &self,
        netns: u64,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<FlowEntry>, MapError> {
        self.take_entry(key(netns, peer, local))
    }

    /// The entry of the connection from `peer` to `local`, which was opened in the network namespace `netns`. It stays
    /// until the opener's socket closes: as long as that is there, nobody else's connection there has these ends.
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

    /// Takes what the filter of SYNs knows of the connection: the entry of whoever opened one with these ends last,
    /// in whatever namespace. Any pod can write it, with another's address; it tells nothing for certain.
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
            // The socket's close may have been faster.
            let _ = maps.flows.remove(&key);
        }
        Ok(found)
    }

    /// Forgets pods that had nothing open and opened nothing since the sweep before.
    pub fn sweep(&self) {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.pods.sweep();
    }
}

// === impl Maps ===

impl Maps {
    fn find(&self, key: &FlowKey) -> Result<Option<FlowEntry>, MapError> {
        match self.flows.get(key, 0) {
            Ok(Opener { cgroup, netns, on_host, .. }) => {
                Ok(Some(FlowEntry { cgroup, netns, on_host: on_host != 0 }))
            }
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

// === impl Holders ===

impl Holders {
    fn sweep(&mut self) {
        let held = self.held.iter().flatten().filter(|(_, held)| held.open <= 0);
        let idle: HashSet<(u64, i64)> = held.map(|(key, held)| (key, held.opened)).collect();
        for (key, _) in idle.intersection(&self.idle) {
            // Gone already is as good.
            let _ = self.held.remove(key);
        }
        self.idle = idle;
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

//! The kernel's record of who opened which connection.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, MapData, MapError};
use kiam_common::client::{Client, FlowKey, Held};

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEntry {
    /// Leaf cgroup of the process that called connect.
    pub cgroup: u64,
    /// Cookie of the network namespace it was opened in.
    pub netns: u64,
}

/// Looks up connections; cheap to clone.
#[derive(Clone, Debug)]
pub struct Flows(Arc<Mutex<Maps>>);

#[derive(Debug)]
struct Maps {
    flows: HashMap<MapData, FlowKey, Client>,
    netns: Holders,
    pods: Holders,
}

/// Who has connections, by namespace or by pod.
#[derive(Debug)]
struct Holders {
    held: HashMap<MapData, u64, Held>,
    /// Those that had nothing open when last swept, with how many they had opened.
    idle: HashSet<(u64, i64)>,
}

// === impl Flows ===

impl Flows {
    pub(super) fn new(
        flows: HashMap<MapData, FlowKey, Client>,
        netns: HashMap<MapData, u64, Held>,
        pods: HashMap<MapData, u64, Held>,
    ) -> Self {
        let [netns, pods] = [netns, pods].map(|held| Holders { held, idle: HashSet::new() });
        Self(Arc::new(Mutex::new(Maps { flows, netns, pods })))
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
        let client = self.take_entry(key(netns, peer, local))?;
        Ok(client.map(|client| FlowEntry { cgroup: client.cgroup, netns: client.netns }))
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
        let client = maps.find(&key(netns, peer, local))?;
        Ok(client.map(|client| FlowEntry { cgroup: client.cgroup, netns: client.netns }))
    }

    /// Takes what the listener's side knows of the connection: the network namespace of whoever opened one
    /// with these ends last. Whose it is, the entry of that namespace says.
    ///
    /// # Errors
    ///
    /// As [`Flows::take`].
    pub fn take_namespace(
        &self,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<u64>, MapError> {
        Ok(self.take_entry(key(0, peer, local))?.map(|client| client.netns))
    }

    fn take_entry(&self, key: FlowKey) -> Result<Option<Client>, MapError> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = maps.find(&key)?;
        if found.is_some() {
            // The socket's close may have been faster.
            let _ = maps.flows.remove(&key);
        }
        Ok(found)
    }

    /// Cookies of the network namespaces that have, or lately had, connections to the agent.
    #[must_use]
    pub fn namespaces(&self) -> Vec<u64> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.netns.held.keys().flatten().collect()
    }

    /// Forgets namespaces and pods that had nothing open and opened nothing since the sweep before.
    pub fn sweep(&self) {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.netns.sweep();
        maps.pods.sweep();
    }
}

// === impl Maps ===

impl Maps {
    fn find(&self, key: &FlowKey) -> Result<Option<Client>, MapError> {
        match self.flows.get(key, 0) {
            Ok(client) => Ok(Some(client)),
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

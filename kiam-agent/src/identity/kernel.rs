//! Identity as the kernel attests it.

use std::net::{IpAddr, SocketAddr};

use dashmap::DashMap;

use super::CgroupPaths;
use crate::{
    intercept::{FlowEntry, Flows},
    pods::{Client, ClientResolver, Connection, PodReader, Unattested},
};

/// How many addresses' namespaces are remembered; then the memory starts anew.
const REMEMBERED: usize = 4096;

/// Resolves a connection by the entry that the kernel programs published when it was opened.
///
/// The listener's side does not show the opener's network namespace, which is part of the entry's key. So the
/// namespace that the peer's address had last is tried first, then all that have connections; since an address
/// could be forged in another namespace, an entry counts only if its pod may have the address.
#[derive(Debug)]
pub struct KernelResolver {
    flows: Flows,
    cgroups: CgroupPaths,
    pods: PodReader,
    namespaces: DashMap<IpAddr, u64>,
}

// === impl KernelResolver ===

impl KernelResolver {
    /// One that asks `flows`; `pods` tells which pod may have which address.
    #[must_use]
    pub fn new(flows: Flows, cgroups: CgroupPaths, pods: PodReader) -> Self {
        Self { flows, cgroups, pods, namespaces: DashMap::new() }
    }

    fn take(
        &self,
        netns: u64,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<Option<FlowEntry>, Unattested> {
        let taken = self.flows.take(netns, peer, local);
        taken.map_err(|error| Unattested::Unreadable(error.to_string()))
    }

    /// The client of an entry, and whether nothing speaks against the address being its own.
    fn client(&self, entry: FlowEntry, address: IpAddr) -> Result<(Client, bool), Unattested> {
        let uid = self.cgroups.pod(entry.cgroup)?;
        let client = Client::Pod { uid, address };
        let matches = self.pods.find(&client).is_ok();
        Ok((client, matches))
    }
}

impl ClientResolver for KernelResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        let Connection { peer, local } = *connection;
        let address = peer.ip().to_canonical();
        let remembered = self.namespaces.get(&address).map(|netns| *netns);
        let others = self.flows.namespaces().into_iter().filter(|netns| Some(*netns) != remembered);
        let mut doubtful = Err(Unattested::NoEntry);
        for netns in remembered.into_iter().chain(others) {
            let Some(entry) = self.take(netns, peer, local)? else { continue };
            match self.client(entry, address) {
                Ok((client, true)) => {
                    if self.namespaces.len() >= REMEMBERED {
                        self.namespaces.clear();
                    }
                    self.namespaces.insert(address, netns);
                    return Ok(client);
                }
                // A pod that is not known yet, or whose address it is not: each request decides.
                Ok((client, false)) => doubtful = Ok(client),
                Err(error) if doubtful.is_err() => doubtful = Err(error),
                Err(_) => {}
            }
        }
        doubtful
    }
}

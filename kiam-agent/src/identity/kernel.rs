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
/// namespace that the peer's address had last is tried first, then all that have connections. An address can be
/// forged in another namespace, so the entry counts whose pod has the address; of several that are less
/// certain, none does.
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

    /// The client of an entry, and how well the address speaks for it.
    fn client(&self, entry: FlowEntry, address: IpAddr) -> Result<(Client, Fit), Unattested> {
        let uid = self.cgroups.pod(entry.cgroup)?;
        let client = Client::Pod { uid, address };
        let fit = match self.pods.find(&client) {
            Ok(pod) if pod.host_network || pod.addresses.contains(&address) => Fit::Own,
            Ok(_) => Fit::Possible,
            Err(_) => Fit::Doubtful,
        };
        Ok((client, fit))
    }

    fn remember(&self, address: IpAddr, netns: u64) {
        if self.namespaces.len() >= REMEMBERED {
            self.namespaces.clear();
        }
        self.namespaces.insert(address, netns);
    }
}

impl ClientResolver for KernelResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        let Connection { peer, local } = *connection;
        let address = peer.ip().to_canonical();
        let remembered = self.namespaces.get(&address).map(|netns| *netns);
        let others = self.flows.namespaces().into_iter().filter(|netns| Some(*netns) != remembered);
        let mut candidates = Candidates::default();
        for netns in remembered.into_iter().chain(others) {
            let Some(entry) = self.take(netns, peer, local)? else { continue };
            match self.client(entry, address) {
                Ok((client, Fit::Own)) => {
                    self.remember(address, netns);
                    return Ok(client);
                }
                Ok((client, fit)) => candidates.add(client, fit),
                Err(error) => candidates.errors.push(error),
            }
        }
        candidates.decide()
    }
}

/// How well a connection's source address speaks for the pod that an entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// It is the pod's.
    Own,
    /// The pod's addresses are not known yet.
    Possible,
    /// The pod is not known yet, or the address is not its own: each request decides.
    Doubtful,
}

/// What namespaces said of one connection, none of them for certain.
#[derive(Debug, Default)]
struct Candidates {
    possible: Vec<Client>,
    doubtful: Vec<Client>,
    errors: Vec<Unattested>,
}

// === impl Candidates ===

impl Candidates {
    fn add(&mut self, client: Client, fit: Fit) {
        let list = if fit == Fit::Possible { &mut self.possible } else { &mut self.doubtful };
        list.push(client);
    }

    /// The only candidate of the best sort. Of several, one is forged, and nothing tells which.
    fn decide(self) -> Result<Client, Unattested> {
        for mut list in [self.possible, self.doubtful] {
            match (list.pop(), list.is_empty()) {
                (Some(only), true) => return Ok(only),
                (Some(_), false) => {
                    let count = list.len() + 1;
                    let text = format!("{count} network namespaces have this connection");
                    return Err(Unattested::Unreadable(text));
                }
                (None, _) => {}
            }
        }
        Err(self.errors.into_iter().next().unwrap_or(Unattested::NoEntry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::PodUid;

    fn client(uid: &str) -> Client {
        Client::Pod { uid: PodUid::new(uid), address: IpAddr::from([10, 77, 1, 2]) }
    }

    #[test]
    fn the_only_best_candidate_is_taken_and_several_are_refused() {
        let cases = [
            (vec![], Err(Unattested::NoEntry)),
            (vec![("a", Fit::Doubtful)], Ok(client("a"))),
            (vec![("a", Fit::Possible), ("b", Fit::Doubtful)], Ok(client("a"))),
            (vec![("b", Fit::Doubtful), ("a", Fit::Possible)], Ok(client("a"))),
            (
                vec![("a", Fit::Possible), ("b", Fit::Possible)],
                Err(Unattested::Unreadable("2 network namespaces have this connection".to_owned())),
            ),
        ];
        for (found, expected) in cases {
            let mut candidates = Candidates::default();
            for (uid, fit) in &found {
                candidates.add(client(uid), *fit);
            }
            assert_eq!(candidates.decide(), expected, "{found:?}");
        }
        let gone = Candidates { errors: vec![Unattested::Gone(7)], ..Candidates::default() };
        assert_eq!(gone.decide(), Err(Unattested::Gone(7)));
    }
}

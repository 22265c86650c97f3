//! Identity as the kernel attests it.

use std::{iter, net::IpAddr};

use super::{CgroupPaths, unreadable};
use crate::{
    intercept::{FlowEntry, Flows, Witness},
    pods::{Client, ClientResolver, Connection, PodReader, Unattested},
};

/// Resolves a connection by the entry that the kernel programs published when it was opened.
///
/// The listener's side does not show the opener's network namespace, which is part of the entry's key. The kernel
/// notes the namespace that opened a connection with these ends last, and that one is tried first. An address can
/// be forged in another namespace, so where its pod does not have the address, all that have connections are
/// tried: the entry counts whose pod has it; of several that are less certain, none does.
#[derive(Debug)]
pub struct KernelResolver {
    flows: Flows,
    cgroups: CgroupPaths,
    pods: PodReader,
    witness: Witness,
}

// === impl KernelResolver ===

impl KernelResolver {
    /// One that asks `flows`; `pods` tells which pod may have which address, and `witness` is shown the
    /// connections of the agent's own proof.
    #[must_use]
    pub fn new(flows: Flows, cgroups: CgroupPaths, pods: PodReader, witness: Witness) -> Self {
        Self { flows, cgroups, pods, witness }
    }

    /// The client of an entry, and whether the address speaks for it for certain.
    fn client(&self, entry: FlowEntry, address: IpAddr) -> Result<(Client, bool), Unattested> {
        let uid = self.cgroups.pod(entry.cgroup)?;
        let client = Client::Pod { uid, address };
        let pod = self.pods.find(&client);
        let certain = pod.is_ok_and(|pod| pod.host_network || pod.addresses.contains(&address));
        Ok((client, certain))
    }
}

impl ClientResolver for KernelResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        let Connection { peer, local } = *connection;
        let address = peer.ip().to_canonical();
        let noted = self.flows.take_namespace(peer, local).map_err(unreadable)?;
        let mut candidates = Candidates::default();
        // The list of all is made only where the noted one is not enough.
        let others = || self.flows.namespaces().into_iter().filter(|netns| Some(*netns) != noted);
        for netns in noted.into_iter().chain(iter::once_with(others).flatten()) {
            let taken = self.flows.take(netns, peer, local).map_err(unreadable)?;
            let Some(entry) = taken else { continue };
            if self.witness.saw(entry, peer) {
                return Err(Unattested::Proof);
            }
            match self.client(entry, address) {
                Ok((client, true)) => return Ok(client),
                Ok((client, false)) => candidates.clients.push(client),
                Err(error) => candidates.errors.push(error),
            }
        }
        candidates.decide()
    }
}

/// What namespaces said of one connection, none of them for certain.
#[derive(Debug, Default)]
struct Candidates {
    clients: Vec<Client>,
    errors: Vec<Unattested>,
}

// === impl Candidates ===

impl Candidates {
    /// The only candidate; each request decides whether it is a known pod whose address that may be. Of several,
    /// all but one are forged, and nothing tells which.
    fn decide(mut self) -> Result<Client, Unattested> {
        match (self.clients.pop(), self.clients.len()) {
            (Some(only), 0) => Ok(only),
            (Some(_), others) => {
                let text = format!("{} network namespaces have this connection", others + 1);
                Err(Unattested::Unreadable(text))
            }
            (None, _) => Err(self.errors.into_iter().next().unwrap_or(Unattested::NoEntry)),
        }
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
    fn the_only_candidate_is_taken_and_several_are_refused() {
        let several = "2 network namespaces have this connection".to_owned();
        let cases: [(&[&str], _); 3] = [
            (&[], Err(Unattested::NoEntry)),
            (&["a"], Ok(client("a"))),
            (&["a", "b"], Err(Unattested::Unreadable(several))),
        ];
        for (uids, expected) in cases {
            let clients = uids.iter().map(|uid| client(uid)).collect();
            let candidates = Candidates { clients, ..Candidates::default() };
            assert_eq!(candidates.decide(), expected, "{uids:?}");
        }
        let gone = Candidates { errors: vec![Unattested::Gone(7)], ..Candidates::default() };
        assert_eq!(gone.decide(), Err(Unattested::Gone(7)));
    }
}

//! Identity as the kernel attests it.

use std::{fmt::Display, iter, net::IpAddr};

use super::CgroupPaths;
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
                Ok((client, Fit::Own)) => return Ok(client),
                Ok((client, fit)) => candidates.add(client, fit),
                Err(error) => candidates.errors.push(error),
            }
        }
        candidates.decide()
    }
}

fn unreadable(error: impl Display) -> Unattested {
    Unattested::Unreadable(error.to_string())
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

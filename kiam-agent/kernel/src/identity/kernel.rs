//! Identity as the kernel attests it, at the node listener.

use std::{net::IpAddr, sync::Arc};

use super::{CgroupPaths, opener, unreadable};
use crate::{
    intercept::{FlowEntry, Flows},
    selftest::Witness,
};
use kiam_core::pods::{
    Client, ClientResolver, Connection, NodeAddresses, Origin, PodNamespace, PodNamespaces,
    PodReader, PodUid, Unattested,
};

/// The resolver of the node listener, by the entry that the kernel programs published when a connection was established.
///
/// An entry proves a connection's pod only in a network namespace that is known to be the pod's, since any user can
/// create a namespace with any address. The listener sees the opener's address and not its namespace, so only the
/// namespaces of pods that may have the address are tried. If two of them have the connection, it is rejected.
#[derive(Debug)]
pub struct KernelResolver {
    flows: Flows,
    cgroups: CgroupPaths,
    witness: Witness,
    namespaces: Option<Namespaces>,
}

/// The network namespaces that connections may come from.
#[derive(Clone, Debug)]
pub struct Namespaces {
    /// The cookie of the node's namespace.
    pub host: u64,
    /// The node's addresses: connections from these were opened in the node's namespace.
    pub node: Arc<dyn NodeAddresses>,
    /// The records of pods, with their addresses.
    pub pods: PodReader,
    /// The namespaces of pods.
    pub sandboxes: Arc<dyn PodNamespaces>,
}

/// The owner of a network namespace.
#[derive(Debug)]
enum NamespaceOwner {
    Node,
    Pod(PodUid),
    Selftest,
}

// === impl KernelResolver ===

impl KernelResolver {
    /// A resolver over `flows`. `witness` sees the connections of the agent's self-test. Without `namespaces`, as before
    /// kernel 5.14, a pod is identified by its address, and the kernel marks hostNetwork pods.
    #[must_use]
    pub fn new(
        flows: Flows,
        cgroups: CgroupPaths,
        witness: Witness,
        namespaces: Option<Namespaces>,
    ) -> Self {
        Self { flows, cgroups, witness, namespaces }
    }

    /// Resolves the connection in all of `namespaces` that may have opened it.
    fn resolve_in(
        &self,
        namespaces: &Namespaces,
        connection: &Connection,
    ) -> Result<Client, Unattested> {
        let Connection { peer, local } = *connection;
        let address = peer.ip().to_canonical();
        let own = self.witness.namespace(address).map(|netns| (netns, NamespaceOwner::Selftest));
        let candidates = own.into_iter().chain(namespaces.of(address));
        let mut found = Vec::new();
        for (netns, owner) in candidates {
            let taken = self.flows.take(netns, peer, local).map_err(unreadable)?;
            found.extend(taken.map(|entry| (entry, owner)));
        }
        let (entry, owner) = only(found)?;
        if self.witness.saw(entry, peer) {
            return Err(Unattested::Selftest);
        }
        let (uid, opener) = opener(&self.flows, &self.cgroups, entry)?;
        let origin = match owner {
            NamespaceOwner::Node => Origin::Node,
            NamespaceOwner::Pod(pod) if pod == uid => Origin::Pod,
            NamespaceOwner::Pod(listener) => {
                return Err(Unattested::OtherPod { caller: uid, listener });
            }
            NamespaceOwner::Selftest => return Err(Unattested::NoEntry),
        };
        Ok(Client::Pod { uid, address, origin, opener })
    }

    /// Resolves by the last entry for connections with these ends. Another pod can overwrite the entry, so that this
    /// connection is rejected, but not impersonate the pod, as it does not have the address.
    fn resolve_last(&self, connection: &Connection) -> Result<Client, Unattested> {
        let Connection { peer, local } = *connection;
        let last = self.flows.take_last(peer, local).map_err(unreadable)?;
        let entry = last.ok_or(Unattested::NoEntry)?;
        if self.witness.saw(entry, peer) {
            return Err(Unattested::Selftest);
        }
        let (uid, opener) = opener(&self.flows, &self.cgroups, entry)?;
        let origin = if entry.on_host { Origin::Node } else { Origin::Unknown };
        Ok(Client::Pod { uid, address: peer.ip().to_canonical(), origin, opener })
    }
}

impl ClientResolver for KernelResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        match &self.namespaces {
            Some(namespaces) => self.resolve_in(namespaces, connection),
            None => self.resolve_last(connection),
        }
    }
}

// === impl Namespaces ===

impl Namespaces {
    /// The namespaces that `address` may be in, each once.
    fn of(&self, address: IpAddr) -> Vec<(u64, NamespaceOwner)> {
        if self.node.contains(address) {
            return vec![(self.host, NamespaceOwner::Node)];
        }
        let pods = self.pods.pods_at(address);
        let mut known: Vec<_> = pods.iter().flat_map(|pod| self.sandboxes.of_pod(pod)).collect();
        // A pod without a known address may have this one.
        known.extend(self.sandboxes.without_address());
        known.sort_unstable_by_key(|of_pod| of_pod.netns);
        known.dedup_by_key(|of_pod| of_pod.netns);
        known
            .into_iter()
            .map(|PodNamespace { uid, netns }| (netns, NamespaceOwner::Pod(uid)))
            .collect()
    }
}

/// The only entry. If there are several, all but one are forged, and nothing shows which.
fn only(
    mut found: Vec<(FlowEntry, NamespaceOwner)>,
) -> Result<(FlowEntry, NamespaceOwner), Unattested> {
    match (found.pop(), found.len()) {
        (Some(only), 0) => Ok(only),
        (Some(_), others) => Err(Unattested::Contested(others + 1)),
        (None, _) => Err(Unattested::NoEntry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::pods::{
        Config, Pod, PodIndex,
        fixtures::{ip, uid},
    };

    /// Pods that have the namespace of their number.
    #[derive(Debug)]
    struct Sandboxes(Vec<u64>);

    impl PodNamespaces for Sandboxes {
        fn of_pod(&self, pod: &Pod) -> Vec<PodNamespace> {
            let of = |n: u64| PodNamespace { uid: pod.uid.clone(), netns: n };
            (1..9).filter(|n| uid(*n as u32) == pod.uid).map(of).collect()
        }

        fn without_address(&self) -> Vec<PodNamespace> {
            let of = |n: &u64| PodNamespace { uid: uid(*n as u32), netns: *n };
            self.0.iter().map(of).collect()
        }
    }

    #[derive(Debug)]
    struct Node;

    impl NodeAddresses for Node {
        fn contains(&self, address: IpAddr) -> bool {
            address == ip("192.0.2.1")
        }
    }

    fn candidates(address: &str, pods: Vec<Pod>, without_address: &[u64]) -> Vec<u64> {
        let (index, pods_read) = PodIndex::with(Config::default());
        pods.into_iter().for_each(|pod| index.apply(pod));
        let sandboxes = Arc::new(Sandboxes(without_address.to_vec()));
        let namespaces = Namespaces { host: 100, node: Arc::new(Node), pods: pods_read, sandboxes };
        namespaces.of(ip(address)).into_iter().map(|(netns, _)| netns).collect()
    }

    #[test]
    fn only_namespaces_that_may_have_the_address_are_asked() {
        let pods = || vec![Pod::test(1).at(&["10.0.0.1"]), Pod::test(2).at(&["10.0.0.2"])];
        // A pod that has no address yet is not on the node's network, whatever it has made there.
        assert_eq!(candidates("192.0.2.1", pods(), &[3]), [100]);
        assert_eq!(candidates("10.0.0.1", pods(), &[]), [1]);
        assert_eq!(candidates("10.0.0.1", pods(), &[3, 4]), [1, 3, 4]);
        assert_eq!(candidates("10.0.0.9", pods(), &[3, 4]), [3, 4]);
        assert!(candidates("10.0.0.9", pods(), &[]).is_empty());
    }

    #[test]
    fn the_only_entry_is_taken_and_several_are_refused() {
        let entry = |netns| {
            (FlowEntry { cgroup: 7, netns, socket: 9, on_host: false }, NamespaceOwner::Pod(uid(1)))
        };
        assert_eq!(only(Vec::new()).unwrap_err(), Unattested::NoEntry);
        assert_eq!(only(vec![entry(1)]).unwrap().0.netns, 1);
        assert_eq!(only(vec![entry(1), entry(2)]).unwrap_err(), Unattested::Contested(2));
    }
}

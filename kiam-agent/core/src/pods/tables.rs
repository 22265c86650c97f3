//! The records, and the secondary keys of live pods.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    net::IpAddr,
    sync::Arc,
};

use super::{
    Annotation, Namespace, Pod, PodUid, ServiceAccount,
    changes::ChangeLog,
    kind::RecordKind as _,
    records::{Change, Records},
};
use crate::{maps::RequestMap, role::AccountName};

/// The number of former roles that are remembered for a pod.
const FORMER_ROLES: usize = 4;

/// The tables that [`super::PodIndex`] writes and [`super::PodReader`] reads, under one lock.
#[derive(Debug, Default)]
pub struct Tables {
    pub(super) pods: Records<PodUid, Pod>,
    pub(super) namespaces: Records<String, Namespace>,
    pub(super) accounts: Records<AccountName, ServiceAccount>,
    /// Live pods with an address of their own.
    by_address: Keys<IpAddr>,
    /// Live mirror pods, by the static pod's UID.
    by_config_hash: Keys<PodUid>,
    static_pod_namespaces: Vec<String>,
    former_roles: FormerRoles,
    pub(super) log: ChangeLog,
}

/// The roles that live pods named before their current ones, as written, the latest first.
#[derive(Debug, Default)]
struct FormerRoles(HashMap<PodUid, Vec<Annotation>>);

/// Pods by a secondary key, which several may share for a while.
#[derive(Debug)]
struct Keys<K>(RequestMap<K, HashSet<PodUid>>);

// === impl Tables ===

impl Tables {
    /// Empty tables. Mirror pods count in these namespaces.
    pub(super) fn new(static_pod_namespaces: Vec<String>) -> Self {
        Self { static_pod_namespaces, ..Self::default() }
    }

    /// Updates the secondary keys after changes of `pods`.
    pub(super) fn follow(&mut self, changes: impl IntoIterator<Item = Change<Pod>>) -> bool {
        let mut changed = false;
        for Change { before, after } in changes {
            changed = true;
            if let Some(pod) = after.as_deref().or(before.as_deref()) {
                self.log.push(pod.changed());
            }
            self.former_roles.follow(before.as_deref(), after.as_deref());
            if let Some(pod) = before {
                for address in own_addresses(&pod) {
                    self.by_address.remove(&address, &pod.uid);
                }
                if let Some(hash) = self.static_uid(&pod) {
                    self.by_config_hash.remove(hash, &pod.uid);
                }
            }
            if let Some(pod) = after {
                for address in own_addresses(&pod) {
                    self.by_address.insert(address, &pod.uid);
                }
                if let Some(hash) = self.static_uid(&pod) {
                    self.by_config_hash.insert(hash.clone(), &pod.uid);
                }
            }
        }
        changed
    }

    /// The live pods whose records show `address` as their own.
    pub(super) fn pods_at(&self, address: IpAddr) -> Vec<Arc<Pod>> {
        self.pods_of(self.by_address.get(&address.to_canonical()))
    }

    /// The live mirror pods that claim this config hash.
    pub(super) fn mirrors_of(&self, hash: &PodUid) -> Vec<Arc<Pod>> {
        self.pods_of(self.by_config_hash.get(hash))
    }

    /// The roles that the pod named before.
    pub(super) fn former_roles(&self, uid: &PodUid) -> Vec<Annotation> {
        self.former_roles.0.get(uid).cloned().unwrap_or_default()
    }

    fn static_uid<'a>(&self, pod: &'a Pod) -> Option<&'a PodUid> {
        let trusted = pod.live && self.static_pod_namespaces.contains(&pod.namespace);
        pod.config_hash.as_ref().filter(|_| trusted)
    }

    fn pods_of<'a>(&self, uids: impl Iterator<Item = &'a PodUid>) -> Vec<Arc<Pod>> {
        uids.filter_map(|uid| self.pods.get(uid).cloned()).collect()
    }
}

/// The addresses that identify `pod`: none if it has ended, or uses the node's network.
fn own_addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let identifies = pod.live && !pod.host_network;
    pod.addresses.iter().filter(move |_| identifies).map(IpAddr::to_canonical)
}

// === impl FormerRoles ===

impl FormerRoles {
    fn follow(&mut self, before: Option<&Pod>, after: Option<&Pod>) {
        let (Some(before), Some(after)) = (before, after.filter(|pod| pod.live)) else {
            // The pod is new, or gone, or has ended.
            if let Some(pod) = before {
                self.0.remove(&pod.uid);
            }
            return;
        };
        let former = before.role.as_ref().filter(|role| role.text().is_ok());
        if let Some(role) = former.filter(|role| after.role.as_ref() != Some(role)) {
            let roles = self.0.entry(after.uid.clone()).or_default();
            roles.retain(|known| known != role);
            roles.insert(0, role.clone());
            roles.truncate(FORMER_ROLES);
        }
    }
}

// === impl Keys ===

impl<K> Default for Keys<K> {
    fn default() -> Self {
        Self(RequestMap::default())
    }
}

impl<K: Eq + Hash> Keys<K> {
    fn get(&self, key: &K) -> impl Iterator<Item = &PodUid> {
        self.0.get(key).into_iter().flatten()
    }

    fn insert(&mut self, key: K, uid: &PodUid) {
        self.0.entry(key).or_default().insert(uid.clone());
    }

    fn remove(&mut self, key: &K, uid: &PodUid) {
        if let Some(uids) = self.0.get_mut(key) {
            uids.remove(uid);
            if uids.is_empty() {
                self.0.remove(key);
            }
        }
    }
}

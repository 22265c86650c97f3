//! The records and their one writer.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{Namespace, Pod, PodReader, PodUid};

/// Static pods are believed only in this namespace, where nobody but the cluster's owner makes pods.
const STATIC_POD_NAMESPACE: &str = "kube-system";

/// Without a sign of life for this long, the watch is not trusted with who has which address. Bookmarks
/// come about once a minute.
pub(super) const STALE_AFTER: Duration = Duration::from_secs(90);

/// The writer: what the Kubernetes API said last.
#[derive(Debug)]
pub struct PodIndex(Arc<Shared>);

/// What the writer and the readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) records: RwLock<Records>,
    pub(super) revision: watch::Sender<u64>,
    pub(super) missed: Notify,
    heard: RwLock<Option<Instant>>,
}

#[derive(Debug, Default)]
pub(super) struct Records {
    pods: HashMap<PodUid, Arc<Pod>>,
    namespaces: BTreeMap<String, Arc<Namespace>>,
    /// UIDs of the live pods, not of the host's network, that have an address.
    by_address: HashMap<IpAddr, HashSet<PodUid>>,
    /// UIDs of mirror pods by the UID that the kubelet gave the static pod.
    by_hash: HashMap<PodUid, HashSet<PodUid>>,
}

// === impl PodIndex ===

impl PodIndex {
    /// An empty index and its reader.
    #[must_use]
    pub fn new() -> (Self, PodReader) {
        let shared = Arc::new(Shared {
            records: RwLock::default(),
            revision: watch::Sender::new(0),
            missed: Notify::new(),
            heard: RwLock::default(),
        });
        (Self(shared.clone()), PodReader(shared))
    }

    /// The watch lives: an event, a bookmark or a list came.
    pub fn heard(&self) {
        *self.0.heard.write().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// A pod was added or changed. A record that is older than the one held is left out.
    pub fn apply(&self, pod: Pod) {
        self.write(|records| records.apply(pod));
    }

    /// The pod with this UID is gone.
    pub fn delete(&self, uid: &PodUid) {
        self.write(|records| records.remove(uid));
    }

    /// A whole list, as of `version`: what it lacks is gone, but for records that are newer than the list.
    pub fn reset(&self, pods: Vec<Pod>, version: Option<u64>) {
        self.write(|records| {
            let listed: HashSet<PodUid> = pods.iter().map(|pod| pod.uid.clone()).collect();
            let gone = |pod: &Arc<Pod>| {
                !listed.contains(&pod.uid) && !newer(pod.resource_version, version)
            };
            let gone: Vec<PodUid> =
                records.pods.values().filter(|pod| gone(pod)).map(|pod| pod.uid.clone()).collect();
            for uid in gone {
                records.remove(&uid);
            }
            for pod in pods {
                records.apply(pod);
            }
        });
    }

    /// A namespace was added or changed.
    pub fn apply_namespace(&self, namespace: Namespace) {
        self.write(|records| records.apply_namespace(namespace));
    }

    /// A namespace is gone.
    pub fn delete_namespace(&self, name: &str) {
        self.write(|records| {
            records.namespaces.remove(name);
        });
    }

    /// All namespaces, as of `version`.
    pub fn reset_namespaces(&self, namespaces: Vec<Namespace>, version: Option<u64>) {
        self.write(|records| {
            let listed: HashSet<&str> = namespaces.iter().map(|item| item.name.as_str()).collect();
            records.namespaces.retain(|name, held| {
                listed.contains(name.as_str()) || newer(held.resource_version, version)
            });
            for namespace in namespaces {
                records.apply_namespace(namespace);
            }
        });
    }

    fn write(&self, change: impl FnOnce(&mut Records)) {
        change(&mut self.0.records.write().unwrap_or_else(PoisonError::into_inner));
        self.0.revision.send_modify(|revision| *revision += 1);
    }
}

// === impl Shared ===

impl Shared {
    /// How long the watch has been silent; `None` before its first sign of life.
    pub(super) fn silence(&self) -> Option<Duration> {
        let heard = self.heard.read().unwrap_or_else(PoisonError::into_inner);
        heard.map(|heard| heard.elapsed())
    }
}

// === impl Records ===

impl Records {
    pub(super) fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    /// By its own UID, which always wins; else the one mirror pod of a static pod with that UID.
    pub(super) fn pod(&self, uid: &PodUid) -> Option<&Arc<Pod>> {
        self.pods.get(uid).or_else(|| {
            let mirrors = self.by_hash.get(uid)?;
            let only = mirrors.iter().next().filter(|_| mirrors.len() == 1)?;
            self.pods.get(only)
        })
    }

    pub(super) fn at(&self, address: IpAddr) -> Vec<Arc<Pod>> {
        let uids = self.by_address.get(&address).into_iter().flatten();
        uids.filter_map(|uid| self.pods.get(uid)).cloned().collect()
    }

    pub(super) fn namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        self.namespaces.get(name).cloned()
    }

    fn apply(&mut self, pod: Pod) {
        let held = self.pods.get(&pod.uid).map(|held| held.resource_version);
        if held.is_some_and(|held| newer(held, pod.resource_version)) {
            return;
        }
        self.remove(&pod.uid);
        if pod.live && !pod.host_network {
            for address in &pod.addresses {
                self.by_address.entry(*address).or_default().insert(pod.uid.clone());
            }
        }
        if let Some(hash) = mirrored(&pod) {
            self.by_hash.entry(hash).or_default().insert(pod.uid.clone());
        }
        self.pods.insert(pod.uid.clone(), Arc::new(pod));
    }

    fn remove(&mut self, uid: &PodUid) {
        let Some(pod) = self.pods.remove(uid) else { return };
        for address in &pod.addresses {
            forget(&mut self.by_address, address, uid);
        }
        if let Some(hash) = mirrored(&pod) {
            forget(&mut self.by_hash, &hash, uid);
        }
    }

    fn apply_namespace(&mut self, namespace: Namespace) {
        let held = self.namespaces.get(&namespace.name).map(|held| held.resource_version);
        if !held.is_some_and(|held| newer(held, namespace.resource_version)) {
            self.namespaces.insert(namespace.name.clone(), Arc::new(namespace));
        }
    }
}

/// Whether `held` is known to be newer than `other`. Versions that are no numbers are not compared.
fn newer(held: Option<u64>, other: Option<u64>) -> bool {
    matches!((held, other), (Some(held), Some(other)) if held > other)
}

fn mirrored(pod: &Pod) -> Option<PodUid> {
    let hash = pod.config_hash.as_deref()?;
    (pod.namespace == STATIC_POD_NAMESPACE).then(|| PodUid::new(hash))
}

fn forget<K: Eq + std::hash::Hash>(index: &mut HashMap<K, HashSet<PodUid>>, key: &K, uid: &PodUid) {
    if let Some(uids) = index.get_mut(key) {
        uids.remove(uid);
        if uids.is_empty() {
            index.remove(key);
        }
    }
}

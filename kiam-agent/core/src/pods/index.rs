//! The write side: takes what the Kubernetes watch shows.

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    Config, Namespace, NodeAddresses, Pod, PodReader, PodUid, ServiceAccount, reader::STALE_AFTER,
    tables::Tables,
};
use crate::role::AccountName;

/// The only writer of the pod table. Older records never replace newer ones, in whatever order events
/// and lists come.
#[derive(Debug)]
pub struct PodIndex(Arc<Shared>);

/// What the writer and the readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tables: RwLock<Tables>,
    pub(super) node: Arc<dyn NodeAddresses>,
    /// Goes up with every change of `tables`.
    pub(super) revision: watch::Sender<u64>,
    /// The last signs of life of the watches.
    pub(super) heard: Mutex<Heard>,
    /// Someone asked for a pod that is not known.
    pub(super) missed: Notify,
}

/// When the watch of each kind gave its last sign of life; none before the first.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) pods: Option<Instant>,
    pub(super) namespaces: Option<Instant>,
    pub(super) accounts: Option<Instant>,
}

// === impl PodIndex ===

impl PodIndex {
    /// [`PodIndex::with`] the least: static pods in `kube-system`, and a node with loopback addresses alone.
    #[must_use]
    pub fn new() -> (Self, PodReader) {
        Self::with(Config::default())
    }

    /// An empty table, and a reader of it (clone it).
    #[must_use]
    pub fn with(config: Config) -> (Self, PodReader) {
        let shared = Arc::new(Shared {
            tables: RwLock::new(Tables::new(config.static_pod_namespaces)),
            node: config.node,
            revision: watch::Sender::new(0),
            heard: Mutex::default(),
            missed: Notify::new(),
        });
        (Self(Arc::clone(&shared)), PodReader::new(shared))
    }

    /// Another reader of this table.
    #[must_use]
    pub fn reader(&self) -> PodReader {
        PodReader::new(Arc::clone(&self.0))
    }

    /// Takes one pod as an event shows it, unless what is known is newer.
    pub fn apply(&self, pod: Pod) {
        self.write(|tables| {
            let (uid, version, pod) = pod.record();
            let change = tables.pods.apply(uid, version, pod);
            tables.follow(change)
        });
    }

    /// The pod is gone, and its UID with it: no list or event of before can bring it back.
    pub fn delete(&self, uid: &PodUid) {
        self.write(|tables| {
            // Nothing of this pod is newer than anything that was seen up to its end.
            let change = tables.pods.delete(uid, tables.pods.newest());
            tables.follow(change)
        });
    }

    /// Takes a whole list, made at `resource_version`: pods that it lacks are dropped, but for those
    /// that an event showed to be newer than the list.
    pub fn reset(&self, pods: Vec<Pod>, resource_version: Option<u64>) {
        self.write(|tables| {
            let changes = tables.pods.reset(pods.into_iter().map(Pod::record), resource_version);
            tables.follow(changes)
        });
    }

    /// The newest version of any pod record, deletion or list seen so far.
    #[must_use]
    pub fn newest(&self) -> Option<u64> {
        self.0.read().pods.newest()
    }

    /// Forgets the pods' versions (not the pods), so that the next list holds as it is. For a server
    /// whose history went back, as after a restore of etcd; nothing newer would ever be taken else.
    pub fn rewind(&self) {
        self.0.write().pods.rewind();
    }

    /// Takes one namespace as an event shows it, unless what is known is newer.
    pub fn apply_namespace(&self, namespace: Namespace) {
        self.write(|tables| {
            let (name, version, namespace) = namespace.record();
            tables.namespaces.apply(name, version, namespace).is_some()
        });
    }

    /// The namespace went; one of the same name may come later.
    pub fn delete_namespace(&self, name: &str, resource_version: Option<u64>) {
        self.write(|tables| tables.namespaces.delete(&name.to_owned(), resource_version).is_some());
    }

    /// Takes a whole list of namespaces, as [`PodIndex::reset`] does for pods.
    pub fn reset_namespaces(&self, namespaces: Vec<Namespace>, resource_version: Option<u64>) {
        self.write(|tables| {
            let list = namespaces.into_iter().map(Namespace::record);
            !tables.namespaces.reset(list, resource_version).is_empty()
        });
    }

    /// [`PodIndex::newest`], of namespaces.
    #[must_use]
    pub fn newest_namespace(&self) -> Option<u64> {
        self.0.read().namespaces.newest()
    }

    /// [`PodIndex::rewind`], of namespaces.
    pub fn rewind_namespaces(&self) {
        self.0.write().namespaces.rewind();
    }

    /// Takes one ServiceAccount as an event shows it, unless what is known is newer.
    pub fn apply_account(&self, account: ServiceAccount) {
        self.write(|tables| {
            let (name, version, account) = account.record();
            tables.accounts.apply(name, version, account).is_some()
        });
    }

    /// The ServiceAccount went; one of the same name may come later.
    pub fn delete_account(&self, name: &AccountName, resource_version: Option<u64>) {
        self.write(|tables| tables.accounts.delete(name, resource_version).is_some());
    }

    /// Takes a whole list of ServiceAccounts, as [`PodIndex::reset`] does for pods.
    pub fn reset_accounts(&self, accounts: Vec<ServiceAccount>, resource_version: Option<u64>) {
        self.write(|tables| {
            let list = accounts.into_iter().map(ServiceAccount::record);
            !tables.accounts.reset(list, resource_version).is_empty()
        });
    }

    /// [`PodIndex::newest`], of ServiceAccounts.
    #[must_use]
    pub fn newest_account(&self) -> Option<u64> {
        self.0.read().accounts.newest()
    }

    /// [`PodIndex::rewind`], of ServiceAccounts.
    pub fn rewind_accounts(&self) {
        self.0.write().accounts.rewind();
    }

    /// The pods' watch gave a sign of life: an event, a bookmark or a list that can't be older than the last one.
    pub fn heard(&self) {
        let before = self.0.heard().pods.replace(Instant::now());
        // Those who were refused because of the silence may look again.
        if before.is_some_and(|at| at.elapsed() >= STALE_AFTER) {
            self.0.changed();
        }
    }

    /// So did the namespaces' watch.
    pub fn heard_namespaces(&self) {
        self.0.heard().namespaces = Some(Instant::now());
    }

    /// So did the ServiceAccounts' watch.
    pub fn heard_accounts(&self) {
        self.0.heard().accounts = Some(Instant::now());
    }

    fn write(&self, change: impl FnOnce(&mut Tables) -> bool) {
        let changed = change(&mut self.0.write());
        if changed {
            self.0.changed();
        }
    }
}

// Of a record, its key, its version, and the rest, which says whether anything changed: an object has a new version
// at each touch of whatever else it holds.

impl Pod {
    fn record(mut self) -> (PodUid, Option<u64>, Self) {
        let version = self.resource_version.take();
        (self.uid.clone(), version, self)
    }
}

impl Namespace {
    fn record(mut self) -> (String, Option<u64>, Self) {
        let version = self.resource_version.take();
        (self.name.clone(), version, self)
    }
}

impl ServiceAccount {
    fn record(mut self) -> (AccountName, Option<u64>, Self) {
        let version = self.resource_version.take();
        (self.name.clone(), version, self)
    }
}

// === impl Shared ===

impl Shared {
    pub(super) fn read(&self) -> std::sync::RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.revision.send_modify(|revision| *revision += 1);
    }
}

//! The write side of the pod table, fed by the Kubernetes watch.

use std::sync::{
    Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard,
    atomic::{AtomicU64, Ordering},
};

use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{Config, NodeAddresses, PodReader, kind::Record, reader::STALE_AFTER, tables::Tables};

/// The only writer of the pod table. Older records never replace newer ones, in whatever order events and lists come.
#[derive(Debug)]
pub struct PodIndex(Arc<Shared>);

/// The state that the writer and the readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tables: RwLock<Tables>,
    pub(super) node: Arc<dyn NodeAddresses>,
    /// Goes up with every change of `tables`.
    pub(super) revision: watch::Sender<u64>,
    /// The same, to be read without a lock.
    pub(super) last_revision: AtomicU64,
    /// When each watch was last heard from.
    pub(super) heard: Mutex<LastHeard>,
    /// Notified when a request waits for an unknown pod.
    pub(super) missed: Notify,
}

/// The time when the watch of each kind was last heard from; `None` before the first time.
#[derive(Debug, Default)]
pub struct LastHeard {
    pub(super) pods: Option<Instant>,
    pub(super) namespaces: Option<Instant>,
    pub(super) accounts: Option<Instant>,
}

// === impl PodIndex ===

impl PodIndex {
    /// An empty table with the default configuration: static pods in `kube-system`, a node with loopback addresses alone.
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
            last_revision: AtomicU64::new(0),
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

    /// Applies an event that shows an object, unless the known record is newer.
    pub fn apply<R: Record>(&self, record: R) {
        self.write(|tables| {
            let (key, version, record) = record.split();
            let change = R::table_mut(tables).apply(key, version, record);
            R::follow(tables, change)
        });
    }

    /// Applies an event that shows an object's deletion, at its `resource_version`. No earlier list or event can bring a
    /// pod's UID back. A namespace or a ServiceAccount of the same name may come later.
    pub fn delete<R: Record>(&self, record: &R) {
        self.write(|tables| {
            let version = record.gone_at(tables);
            let change = R::table_mut(tables).delete(record.key(), version);
            R::follow(tables, change)
        });
    }

    /// Applies a whole list, made at `resource_version`. Objects that it lacks are dropped, except those that an event
    /// showed to be newer than the list.
    pub fn reset<R: Record>(&self, records: Vec<R>, resource_version: Option<u64>) {
        self.write(|tables| {
            let list = records.into_iter().map(R::split);
            let changes = R::table_mut(tables).reset(list, resource_version);
            R::follow(tables, changes)
        });
    }

    /// The newest version of any record, deletion or list of this kind seen so far.
    #[must_use]
    pub fn newest<R: Record>(&self) -> Option<u64> {
        R::table(&self.0.read()).newest()
    }

    /// Forgets the versions of this kind (not the objects), so that the next list replaces everything. This is for a
    /// server whose history went back, as after a restore of etcd, and whose records would look old for ever.
    pub fn rewind<R: Record>(&self) {
        R::table_mut(&mut self.0.write()).rewind();
    }

    /// Records that the watch of this kind was heard from: an event, a bookmark, or a list no older than the last one.
    pub fn heard<R: Record>(&self) {
        let before = R::heard(&mut self.0.heard()).replace(Instant::now());
        // Requests that failed because the watch was stale may look again.
        if R::OPENS_LOOKUPS && before.is_some_and(|at| at.elapsed() >= STALE_AFTER) {
            self.0.changed();
        }
    }

    fn write(&self, change: impl FnOnce(&mut Tables) -> bool) {
        let mut tables = self.0.write();
        if change(&mut tables) {
            // Before anybody can read the change: what was looked up before is not of the new revision.
            self.0.changed();
        }
    }
}

// === impl Shared ===

impl Shared {
    pub(super) fn read(&self) -> std::sync::RwLockReadGuard<'_, Tables> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn heard(&self) -> std::sync::MutexGuard<'_, LastHeard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.revision.send_modify(|revision| {
            *revision += 1;
            self.last_revision.store(*revision, Ordering::Release);
        });
    }
}

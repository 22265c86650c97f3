//! Keeps one kind of objects in sync with the API server by lists and watches.
//!
//! `kube::runtime::watcher` does most of this, but accepts a silent watch for 295 s, does not report bookmarks, and fails
//! a whole list for one malformed object. Here one loop follows the watch, and another one lists from time to time and
//! when an unknown pod is requested. They are independent, and [`kiam_core::pods`] keeps the newer record.

use std::{future::pending, pin::pin, sync::Once, time::Duration};

use kube::{
    api::WatchParams,
    core::{Request, WatchEvent},
};
use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{self, Instant},
};
use tracing::{debug, info, warn};

use super::{
    backoff::{Backoff, jittered},
    body::Body,
    failure::{Failure, WatchEnd},
    freshness::Freshness,
    kinds::{Kind, ObjectScope},
    listing::{self, List},
    metrics::{
        EventKind, EventLabels, ListLabels, ListOutcome, Metrics, RequestKind, RestartLabels,
    },
    outage::Outage,
    wire::{self, Malformed},
};
use kiam_core::lifecycle::{Latch, Readiness};

/// The shortest time between two lists for unknown pods.
const LIST_INTERVAL: Duration = Duration::from_secs(1);
/// The shortest time between two regular lists of namespaces and ServiceAccounts, which every node lists whole.
const METADATA_INTERVAL: Duration = Duration::from_secs(3600);
/// The age from which a watch is reopened at once when it ends; a younger one after a delay.
const SETTLED: Duration = Duration::from_secs(5);
/// The requested length of a watch, as long as the servers' own, at random so that a fleet's watches don't end together.
const WATCH_SECONDS: std::ops::Range<u32> = 300..600;

/// A copy of one [`Kind`] of objects, and the loops that keep it in sync.
pub(super) struct Reflector<K> {
    pub(super) client: kube::Client,
    pub(super) kind: K,
    pub(super) timing: Timing,
    /// Set once the first list is taken.
    pub(super) synced: Latch,
    pub(super) metrics: Metrics,
    first_list: Once,
    lists: Outage,
    /// Separate from lists: a server may answer lists and reject watches.
    watches: Outage,
    /// Notified when the versions went backwards, so that the watch must restart.
    rewound: Notify,
}

/// The dependencies of reflectors.
#[derive(Clone)]
pub(super) struct ReflectorParts {
    pub(super) client: kube::Client,
    pub(super) metrics: Metrics,
    pub(super) readiness: Readiness,
}

/// The times of lists and watches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// The time between two lists of pods, which repair what the watch lost; of other kinds at least an hour.
    pub(super) sync_interval: Duration,
    /// The time without event or bookmark, jittered, after which the watch is replaced and a list is fetched.
    pub(super) stall: Duration,
    /// The time without a current answer of etcd, jittered, after which a list proves that etcd answers.
    pub(super) prove_after: Duration,
}

/// An applied list.
struct AppliedList {
    version: String,
    rewound: bool,
}

// === impl Reflector ===

impl<K: Kind> Reflector<K> {
    pub(super) fn new(connection: &ReflectorParts, kind: K, timing: Timing, synced: Latch) -> Self {
        let ReflectorParts { client, metrics, readiness } = connection.clone();
        let outage = |ask| Outage::new(K::RESOURCE, ask, &metrics, &readiness);
        let (lists, watches) = (outage(RequestKind::List), outage(RequestKind::Watch));
        let (first_list, rewound) = (Once::new(), Notify::new());
        Self { client, kind, timing, synced, metrics, first_list, lists, watches, rewound }
    }

    /// Keeps the copy in sync. Never returns; drop the future to stop it.
    pub(super) async fn run(&self) {
        tokio::join!(self.follow(), self.heal());
    }

    /// Lists, then watches from the list's version. Lists again if the history since then is gone, or if the watch is
    /// silent: a server without any change sends no bookmark, and only a list shows whether such a watch is broken.
    async fn follow(&self) {
        let mut backoff = Backoff::new();
        let mut version = None;
        loop {
            let Some(mut at) = version.take() else {
                // Without etcd, the server's cache is better than nothing.
                let freshness = self.newest().await.unwrap_or(Freshness::Any);
                match self.list(freshness).await {
                    Ok(listed) => version = Some(listed.version),
                    Err(error) => {
                        self.lists.failed(&error);
                        time::sleep(backoff.next()).await;
                    }
                }
                continue;
            };
            let (opened, mut works) = (Instant::now(), false);
            let end = self.watch(&mut at, &mut works).await;
            self.count_restart(&end);
            self.watches.ended(&end, works);
            version = match &end {
                WatchEnd::Closed | WatchEnd::Failed(_) => Some(at),
                WatchEnd::Expired
                | WatchEnd::Rewound
                | WatchEnd::Stalled
                | WatchEnd::Unopened(_) => None,
            };
            if opened.elapsed() >= SETTLED {
                backoff.reset();
            } else {
                time::sleep(backoff.next()).await;
            }
        }
    }

    /// Lists periodically, without a proof for too long, and when an unknown pod is requested.
    async fn heal(&self) {
        let mut backoff = Backoff::new();
        let interval = match K::SCOPE {
            ObjectScope::Whole => self.timing.sync_interval,
            ObjectScope::Metadata => self.timing.sync_interval.max(METADATA_INTERVAL),
        };
        loop {
            let missed = tokio::select! {
                () = time::sleep(jittered(interval)) => false,
                () = self.unproven() => false,
                () = self.kind.missed() => true,
            };
            let next = Instant::now() + LIST_INTERVAL;
            let listed = async { self.list(self.freshness(missed).await?).await };
            match listed.await {
                Ok(listed) => {
                    backoff.reset();
                    if listed.rewound {
                        self.rewound.notify_one();
                    }
                }
                Err(error) => {
                    self.lists.failed(&error);
                    time::sleep(backoff.next()).await;
                }
            }
            time::sleep_until(next).await;
        }
    }

    /// The freshness of the next list, which an unknown pod has caused if `missed`.
    async fn freshness(&self, missed: bool) -> Result<Freshness, Failure> {
        if missed {
            debug!(resource = ?K::RESOURCE, "Listing for an unknown pod");
        }
        // A request waits for a missed pod, so the fastest list is used unless a proof is needed, too.
        let proven = self.kind.silence().is_some_and(|it| it < self.timing.prove_after);
        if missed && proven {
            return Ok(Freshness::Any);
        }
        match self.newest().await {
            // Without etcd, the pod may still be in the server's cache.
            Err(_) if missed => Ok(Freshness::Any),
            newest => newest,
        }
    }

    /// Returns when a proof is due.
    async fn unproven(&self) {
        if !K::PROVEN {
            return pending().await;
        }
        let (after, begun) = (jittered(self.timing.prove_after), Instant::now());
        loop {
            let silence = self.kind.silence().unwrap_or_else(|| begun.elapsed());
            match after.checked_sub(silence) {
                None | Some(Duration::ZERO) => return,
                Some(left) => time::sleep(left).await,
            }
        }
    }

    /// The freshness of etcd's current version, for kinds with [`Kind::PROVEN`].
    async fn newest(&self) -> Result<Freshness, Failure> {
        if !K::PROVEN {
            return Ok(Freshness::Any);
        }
        let asked = listing::newest(&self.client);
        asked.await.inspect_err(|error: &Failure| {
            debug!(%error, "Reading etcd's current version failed");
            self.count_list(ListOutcome::Failed);
        })
    }

    /// Fetches and applies a list. A list that is older than the index comes from a server that lags behind, or from one
    /// whose versions went backwards; a list from etcd shows which.
    async fn list(&self, mut freshness: Freshness) -> Result<AppliedList, Failure> {
        let newest = self.kind.index().newest::<K::Record>();
        let lags = |list: &List<_>| wire::number(Some(&list.version)) < newest;
        let mut rewound = false;
        let list = match self.fetch(&freshness).await {
            Ok(list) if !lags(&list) => list,
            Err(error) if !error.is_of_future() => return Err(error),
            _ => {
                self.count_list(ListOutcome::Lagging);
                freshness = Freshness::MostRecent;
                let list = self.fetch(&freshness).await?;
                rewound = lags(&list);
                list
            }
        };
        if rewound {
            warn!(
                resource = ?K::RESOURCE, list.version, ?newest,
                "The versions of the Kubernetes API went backwards; accepting the older ones"
            );
            self.kind.index().rewind::<K::Record>();
        }
        self.kind.index().reset(list.records, wire::number(Some(&list.version)));
        self.answered(freshness.is_proof());
        self.count_list(ListOutcome::Taken);
        self.first_list.call_once(|| {
            info!(resource = ?K::RESOURCE, count = self.kind.index().reader().count::<K::Record>(), "Synced with the Kubernetes API");
            self.synced.set();
        });
        Ok(AppliedList { version: list.version, rewound })
    }

    async fn fetch(&self, freshness: &Freshness) -> Result<List<K::Record>, Failure> {
        let read = |item: &[u8]| self.read_item(item);
        let fetched = listing::list(&self.client, &self.kind, freshness, read).await;
        fetched.inspect_err(|error: &Failure| {
            if !error.is_of_future() {
                self.count_list(ListOutcome::Failed);
            }
        })
    }

    /// Watches from version `at`, and keeps it where the watch stands. The watch `works` once it has delivered something,
    /// or has lasted: a server may open each watch and end it at once.
    async fn watch(&self, at: &mut String, works: &mut bool) -> WatchEnd {
        let mut params = WatchParams::default().timeout(fastrand::u32(WATCH_SECONDS));
        params.field_selector = self.kind.field_selector();
        let request = Request::new(K::PATH);
        let request = match K::SCOPE {
            ObjectScope::Whole => request.watch(&params, at),
            ObjectScope::Metadata => request.watch_metadata(&params, at),
        };
        let request = match request {
            Ok(request) => request,
            Err(error) => return WatchEnd::Failed(error.into()),
        };
        let stall = jittered(self.timing.stall);
        let opened = time::timeout(stall, self.client.request_stream(request)).await;
        let mut events = match opened {
            Ok(Ok(events)) => Body::new(events, &K::EVENT),
            Ok(Err(error)) => return WatchEnd::of(error),
            Err(_) => return WatchEnd::Unopened(stall),
        };
        let mut lasts = pin!(time::sleep(SETTLED));
        let mut silent_at = Instant::now() + stall;
        loop {
            let next = tokio::select! {
                biased;
                next = time::timeout_at(silent_at, events.line()) => next,
                () = self.rewound.notified() => return WatchEnd::Rewound,
                () = &mut lasts, if !*works => {
                    self.works(works);
                    continue;
                }
            };
            silent_at = Instant::now() + stall;
            match next {
                Ok(Ok(Some(line))) => {
                    match line.map_err(Malformed::from).and_then(|line| wire::event(&line)) {
                        Ok(WatchEvent::Error(status)) => return WatchEnd::of_status(&status),
                        Ok(event) => {
                            self.works(works);
                            self.take(event, at);
                        }
                        Err(malformed) => self.unreadable(&malformed, &Value::Null),
                    }
                }
                Ok(Ok(None)) => return WatchEnd::Closed,
                Ok(Err(failure)) => return WatchEnd::Failed(failure),
                Err(_) => return WatchEnd::Stalled,
            }
        }
    }

    fn works(&self, works: &mut bool) {
        *works = true;
        self.watches.over();
    }

    fn take(&self, event: WatchEvent<Value>, at: &mut String) {
        let before = wire::number(Some(at));
        self.record(event, at);
        self.answered(wire::number(Some(at)) > before);
    }

    fn record(&self, event: WatchEvent<Value>, at: &mut String) {
        let (kind, object) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                (EventKind::Applied, object)
            }
            WatchEvent::Deleted(object) => (EventKind::Deleted, object),
            WatchEvent::Bookmark(bookmark) => {
                *at = bookmark.metadata.resource_version;
                return self.count_event(EventKind::Bookmark);
            }
            // Handled by `watch`.
            WatchEvent::Error(_) => return,
        };
        if let Some(version) = wire::version(&object) {
            version.clone_into(at);
        }
        let Some(record) = self.read(&object) else { return };
        if kind == EventKind::Deleted {
            self.kind.index().delete(&record);
        } else {
            self.kind.index().apply(record);
        }
        self.count_event(kind);
    }

    fn read_item(&self, item: &[u8]) -> Option<K::Record> {
        match serde_json::from_slice(item) {
            Ok(object) => self.read(&object),
            Err(error) => {
                self.unreadable(&Malformed::Json(error), &Value::Null);
                None
            }
        }
    }

    /// Reads an object; a malformed one is logged and skipped.
    fn read(&self, object: &Value) -> Option<K::Record> {
        match self.kind.read(object) {
            Ok(record) => record,
            Err(malformed) => {
                self.unreadable(&malformed, object);
                None
            }
        }
    }

    fn unreadable(&self, malformed: &Malformed, object: &Value) {
        let metadata = |field| object.pointer(&format!("/metadata/{field}"));
        warn!(
            resource = ?K::RESOURCE, object.namespace = ?metadata("namespace"),
            object.name = ?metadata("name"), error = %malformed, "Skipped a malformed object"
        );
        self.count_event(EventKind::Unreadable);
    }

    /// Records an answer of the server; `proof`: with a current answer of etcd.
    fn answered(&self, proof: bool) {
        if proof || !K::PROVEN {
            self.kind.index().heard::<K::Record>();
            self.lists.over();
        }
    }

    fn count_event(&self, kind: EventKind) {
        let labels = EventLabels { resource: K::RESOURCE, kind };
        self.metrics.events.get_or_create(&labels).inc();
    }

    fn count_list(&self, outcome: ListOutcome) {
        let labels = ListLabels { resource: K::RESOURCE, outcome };
        self.metrics.lists.get_or_create(&labels).inc();
    }

    fn count_restart(&self, end: &WatchEnd) {
        let reason = end.restart_reason();
        debug!(resource = ?K::RESOURCE, ?reason, "Watch of the Kubernetes API ended");
        let labels = RestartLabels { resource: K::RESOURCE, reason };
        self.metrics.restarts.get_or_create(&labels).inc();
    }
}

//! Keeps one kind of objects the same here as at the API server: lists, watches, lists again.
//!
//! `kube::runtime::watcher` does most of this, but gives a silent watch 295 s, reports bookmarks to
//! nobody, and fails a whole list for one object that it can't read. What is needed is small enough to be written
//! plainly: one loop follows the watch, another lists from time to time and when somebody asks for a
//! pod that is not known. Neither stops the other, and [`kiam_core::pods`] sorts out who is newer.

use std::{future::pending, sync::Once, time::Duration};

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
    body::{Body, Line},
    failure::{Failure, WatchEnd},
    freshness::Freshness,
    kinds::{Kind, ObjectScope},
    listing::{self, List},
    metrics::{
        EventKind, EventLabels, ListLabels, ListOutcome, Metrics, RequestKind, RestartLabels,
        RestartReason,
    },
    outage::Outage,
    wire::{self, Malformed},
};
use kiam_core::lifecycle::{Latch, Readiness};

/// At most one list in this time, however many pods ask.
const LIST_INTERVAL: Duration = Duration::from_secs(1);
/// Namespaces and ServiceAccounts are listed whole, by every node: no more often than this if nothing is amiss.
const METADATA_INTERVAL: Duration = Duration::from_secs(3600);
/// A watch that lived this long is opened anew at once when it ends; a shorter one after a pause.
const SETTLED: Duration = Duration::from_secs(5);
/// For how long servers are asked to keep a watch: as long as they would themselves, at random so
/// that a fleet's do not end together.
const WATCH_SECONDS: std::ops::Range<u32> = 300..600;
/// Copies one [`Kind`].
pub(super) struct Reflector<K> {
    pub(super) client: kube::Client,
    pub(super) kind: K,
    pub(super) timing: Timing,
    /// Set once the first list is taken.
    pub(super) synced: Latch,
    pub(super) metrics: Metrics,
    first_list: Once,
    lists: Outage,
    /// A server that lists may yet refuse watches, so these fail apart.
    watches: Outage,
    /// The history went back: the watch must start over.
    rewound: Notify,
}

/// The way to the API server, and where it shows how that is.
#[derive(Clone)]
pub(super) struct ReflectorParts {
    pub(super) client: kube::Client,
    pub(super) metrics: Metrics,
    pub(super) readiness: Readiness,
}

/// When to act without being asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// Time between two lists of pods, which heal whatever the watch lost; of other kinds at least an hour.
    pub(super) sync_interval: Duration,
    /// After so long a silence of the watch, up to a tenth more or less: a list, and another watch.
    pub(super) stall: Duration,
    /// After so long, up to a tenth more or less, without a word that etcd has just said: a list that is one.
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

    /// Never returns; stop it by dropping it.
    pub(super) async fn run(&self) {
        tokio::join!(self.follow(), self.heal());
    }

    /// ObjectFilters, then watches from there; lists again if the history since then is gone, or the watch is silent: a server
    /// sends no bookmark while nothing at all happens, and only a list tells a watch that has nothing to say from one
    /// that is broken.
    async fn follow(&self) {
        let mut backoff = Backoff::new();
        let mut version = None;
        loop {
            let Some(mut at) = version.take() else {
                // Where etcd says nothing, what the server has is better than nothing.
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
            let opened = Instant::now();
            let end = self.watch(&mut at).await;
            self.count_restart(&end);
            version = match &end {
                WatchEnd::Closed | WatchEnd::Failed(_) => Some(at),
                WatchEnd::Expired | WatchEnd::Rewound | WatchEnd::Stalled => None,
            };
            if let WatchEnd::Failed(error) = &end {
                self.watches.failed(error);
            }
            if opened.elapsed() >= SETTLED {
                backoff.reset();
            } else {
                time::sleep(backoff.next()).await;
            }
        }
    }

    /// ObjectFilters every now and then, and when a pod is missed.
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

    /// How old a list may be that is made since somebody `missed` a pod, or since it is time.
    async fn freshness(&self, missed: bool) -> Result<Freshness, Failure> {
        if missed {
            debug!(resource = ?K::RESOURCE, "Listing for a miss");
        }
        // Who misses a pod waits for an answer; who does because nothing is proven needs a proof.
        let proven = self.kind.silence().is_some_and(|it| it < self.timing.prove_after);
        if missed && proven {
            return Ok(Freshness::Any);
        }
        match self.newest().await {
            // Without etcd it may still be in the server's cache.
            Err(_) if missed => Ok(Freshness::Any),
            newest => newest,
        }
    }

    /// Returns when nothing has been proven for a while.
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

    /// As new a list as etcd is now, where that matters.
    async fn newest(&self) -> Result<Freshness, Failure> {
        if !K::PROVEN {
            return Ok(Freshness::Any);
        }
        let asked = listing::newest(&self.client);
        asked.await.inspect_err(|error: &Failure| {
            debug!(%error, "The Kubernetes API does not say how new etcd is");
            self.count_list(ListOutcome::Failed);
        })
    }

    /// Takes a list. One that is older than what is known came from a server that lags behind, or from one
    /// whose history went back; a list from etcd itself tells which.
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
                "The history of the Kubernetes API went back, taking it as it is now"
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

    /// Watches from version `at`, and keeps it where the watch stands.
    async fn watch(&self, at: &mut String) -> WatchEnd {
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
            Err(_) => return WatchEnd::Stalled,
        };
        self.watches.over();
        loop {
            let next = tokio::select! {
                next = time::timeout(stall, events.line()) => next,
                () = self.rewound.notified() => return WatchEnd::Rewound,
            };
            match next {
                Ok(Ok(Some(line))) => match event(line) {
                    Ok(WatchEvent::Error(status)) => return WatchEnd::of_status(&status),
                    Ok(event) => self.take(event, at),
                    Err(malformed) => self.unreadable(&malformed, &Value::Null),
                },
                Ok(Ok(None)) => return WatchEnd::Closed,
                Ok(Err(failure)) => return WatchEnd::Failed(failure),
                Err(_) => return WatchEnd::Stalled,
            }
        }
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
            // Ends the watch, see there.
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

    /// Reads an object; one that makes no sense is as if it were not there.
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
            object.name = ?metadata("name"), error = %malformed, "Passed over an object that can't be read"
        );
        self.count_event(EventKind::Unreadable);
    }

    /// The server answered; `proof`: with what etcd has just said.
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
        let reason = match end {
            WatchEnd::Closed => RestartReason::Closed,
            WatchEnd::Stalled => RestartReason::Stalled,
            WatchEnd::Expired => RestartReason::Expired,
            WatchEnd::Rewound => RestartReason::Rewound,
            WatchEnd::Failed(_) => RestartReason::Failed,
        };
        debug!(resource = ?K::RESOURCE, ?reason, "Watch of the Kubernetes API ended");
        let labels = RestartLabels { resource: K::RESOURCE, reason };
        self.metrics.restarts.get_or_create(&labels).inc();
    }
}

/// What a line of a watch says.
fn event(line: Line) -> Result<WatchEvent<Value>, Malformed> {
    wire::event(&line?)
}

//! Metrics of the watches, and the time since they were last heard from.

use std::sync::{Arc, OnceLock};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};

use kiam_core::{
    pods::{Pod, PodReader},
    telemetry::{ByLabel, register},
};

/// Metrics of the requests to the API server.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) events: Family<EventLabels, Counter>,
    pub(super) lists: Family<ListLabels, Counter>,
    pub(super) restarts: Family<RestartLabels, Counter>,
    failing: Family<FailingLabels, Gauge>,
    pod_events: ByLabel<EventOutcome, Counter>,
    pub(super) tokens: ByLabel<TokenOutcome, Counter>,
    evictions: ByLabel<EvictionOutcome, Counter>,
    scrape: Scrape,
}

/// The kinds of objects that are listed and watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Resource {
    Pods,
    Namespaces,
    ServiceAccounts,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct EventLabels {
    pub(super) resource: Resource,
    pub(super) kind: EventKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum EventKind {
    Applied,
    Deleted,
    Bookmark,
    /// Invalid JSON, or not such an object.
    Unreadable,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ListLabels {
    pub(super) resource: Resource,
    pub(super) outcome: ListOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum ListOutcome {
    Taken,
    /// Older than the index, so that the list was repeated.
    Lagging,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RestartLabels {
    pub(super) resource: Resource,
    pub(super) reason: RestartReason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum RestartReason {
    /// The server ended the watch, as it does every few minutes.
    Closed,
    /// Neither event nor bookmark for too long.
    Stalled,
    /// The server no longer has the history from the watch's version on.
    Expired,
    /// The server's versions went backwards.
    Rewound,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailingLabels {
    resource: Resource,
    request: RequestKind,
}

/// The kinds of requests for objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum RequestKind {
    List,
    Watch,
}

/// The outcome of an Event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum EventOutcome {
    Created,
    /// An existing Event was repeated, or was enough.
    Repeated,
    /// The server rejects the Event.
    Refused,
    /// The request failed, or was denied; it is retried.
    Failed,
    /// The trouble ended before the limits allowed a report.
    Dropped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum TokenOutcome {
    Issued,
    /// The agent lacks a right.
    Denied,
    Throttled,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum EvictionOutcome {
    Evicted,
    /// A PodDisruptionBudget allows none now; it is retried.
    Budget,
    /// The pod was gone already.
    Gone,
    /// The agent lacks the right.
    Forbidden,
    Failed,
}

/// State that is read at each scrape, once it exists.
#[derive(Clone, Debug, Default)]
struct Scrape(Arc<OnceLock<PodReader>>);

// === impl Metrics ===

impl Metrics {
    /// Adds the metrics of this part to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let scrape = Scrape::default();
        registry.register_collector(Box::new(scrape.clone()));
        let metrics = Self {
            events: register(
                registry,
                "kiam_cluster_events",
                "Events that the watches of the Kubernetes API delivered",
            ),
            lists: register(
                registry,
                "kiam_cluster_lists",
                "Lists requested from the Kubernetes API",
            ),
            restarts: register(
                registry,
                "kiam_cluster_watch_restarts",
                "Watches of the Kubernetes API that ended and were reopened, by reason",
            ),
            failing: register(
                registry,
                "kiam_cluster_failing",
                "Whether requests to the Kubernetes API fail now",
            ),
            pod_events: ByLabel::register(
                registry,
                "kiam_events",
                "Events about pods and namespaces, by outcome",
                "outcome",
            ),
            tokens: ByLabel::register(
                registry,
                "kiam_cluster_tokens",
                "Tokens of pods' ServiceAccounts requested from the Kubernetes API",
                "outcome",
            ),
            evictions: ByLabel::register(
                registry,
                "kiam_cluster_evictions",
                "Evictions of pods that may hold the node's credentials (--evict-older-pods)",
                "outcome",
            ),
            scrape,
        };
        use EvictionOutcome::{Failed, Forbidden};
        metrics.evictions.show([Failed, Forbidden]);
        metrics.tokens.show([TokenOutcome::Denied, TokenOutcome::Failed]);
        for resource in [Resource::Pods, Resource::Namespaces, Resource::ServiceAccounts] {
            let labels = RestartLabels { resource, reason: RestartReason::Failed };
            drop(metrics.restarts.get_or_create(&labels));
        }
        metrics
    }

    /// The gauge of failing requests of this kind, initially 0.
    pub(super) fn failing(&self, resource: Resource, request: RequestKind) -> Gauge {
        self.failing.get_or_create(&FailingLabels { resource, request }).clone()
    }

    /// Counts `events` with this outcome.
    pub(super) fn count_events(&self, outcome: EventOutcome, events: u64) {
        self.pod_events.of(outcome).inc_by(events);
    }

    /// Counts an eviction with this outcome.
    pub(super) fn count_eviction(&self, outcome: EvictionOutcome) {
        self.evictions.of(outcome).inc();
    }

    /// Exports the state of `pods` from now on.
    pub(super) fn read(&self, pods: &PodReader) {
        // It was set before only if the agent had two indexes.
        let _ = self.scrape.0.set(pods.clone());
    }
}

// === impl Scrape ===

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let Some(reader) = self.0.get() else { return Ok(()) };
        let pods = ConstGauge::new(i64::try_from(reader.count::<Pod>()).unwrap_or(i64::MAX));
        let descriptor = encoder.encode_descriptor(
            "kiam_cluster_pods",
            "Known pods",
            None,
            pods.metric_type(),
        )?;
        pods.encode(descriptor)?;

        // The API server was not heard from yet.
        let Some(silence) = reader.silence() else { return Ok(()) };
        let silence = ConstGauge::new(silence.as_secs_f64());
        let descriptor = encoder.encode_descriptor(
            "kiam_cluster_silence_seconds",
            "Time since the API server was last heard from, of pods, namespaces or ServiceAccounts, whichever is longest",
            None,
            silence.metric_type(),
        )?;
        silence.encode(descriptor)
    }
}

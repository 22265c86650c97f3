//! What the watches did, and how long ago they last gave a sign of life.

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

use kiam_core::pods::{Pod, PodReader};

/// Counters of the conversation with the API server.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub(super) events: Family<EventLabels, Counter>,
    pub(super) lists: Family<ListLabels, Counter>,
    pub(super) restarts: Family<RestartLabels, Counter>,
    failing: Family<FailingLabels, Gauge>,
    pod_events: Family<PodEventLabels, Counter>,
    pub(super) tokens: Family<TokenLabels, Counter>,
    evictions: Family<EvictionLabels, Counter>,
    scrape: Scrape,
}

/// What is listed and watched.
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
    /// Not JSON, or no such object.
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
    /// Older than what was known, so asked for again.
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
    /// The server no longer has the history since where the watch stood.
    Expired,
    /// The server's history went back.
    Rewound,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailingLabels {
    resource: Resource,
    request: RequestKind,
}

/// What is asked of the API server for a kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum RequestKind {
    List,
    Watch,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodEventLabels {
    outcome: EventOutcome,
}

/// What became of Events that there were to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum EventOutcome {
    Created,
    /// One that was there was written again, or was enough.
    Repeated,
    /// The server takes no such Event.
    Refused,
    /// No server, or none that lets the agent write Events; tried again.
    Failed,
    /// What was wrong was over before the limits let it be pod_events.
    Dropped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TokenLabels {
    pub(super) outcome: TokenOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum TokenOutcome {
    Issued,
    /// The agent lacks a right.
    Denied,
    Throttled,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EvictionLabels {
    outcome: EvictionOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum EvictionOutcome {
    Evicted,
    /// A PodDisruptionBudget allows none now; tried again.
    Budget,
    /// The pod was gone already.
    Gone,
    /// The agent lacks the right.
    Forbidden,
    Failed,
}

/// State that is read when it is asked for, once there is some.
#[derive(Clone, Debug, Default)]
struct Scrape(Arc<OnceLock<PodReader>>);

// === impl Metrics ===

impl Metrics {
    /// Adds the metrics of this part to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_cluster_events",
            "Events that the watches of the Kubernetes API delivered",
            metrics.events.clone(),
        );
        registry.register(
            "kiam_cluster_lists",
            "ObjectFilters asked of the Kubernetes API",
            metrics.lists.clone(),
        );
        registry.register(
            "kiam_cluster_watch_restarts",
            "Watches of the Kubernetes API that ended and were opened anew, by why they ended",
            metrics.restarts.clone(),
        );
        registry.register(
            "kiam_cluster_failing",
            "Whether requests to the Kubernetes API fail at present",
            metrics.failing.clone(),
        );
        registry.register(
            "kiam_events",
            "Events about pods and namespaces, by what became of them",
            metrics.pod_events.clone(),
        );
        registry.register(
            "kiam_cluster_tokens",
            "Tokens of pods' ServiceAccounts asked of the Kubernetes API",
            metrics.tokens.clone(),
        );
        registry.register(
            "kiam_cluster_evictions",
            "Evictions of pods that may hold the node's credentials (--evict-older-pods)",
            metrics.evictions.clone(),
        );
        registry.register_collector(Box::new(metrics.scrape.clone()));
        metrics
    }

    /// Whether requests of this kind fail: 0 at first.
    pub(super) fn failing(&self, resource: Resource, request: RequestKind) -> Gauge {
        self.failing.get_or_create(&FailingLabels { resource, request }).clone()
    }

    /// Counts `events` that this became of.
    pub(super) fn count_events(&self, outcome: EventOutcome, events: u64) {
        self.pod_events.get_or_create(&PodEventLabels { outcome }).inc_by(events);
    }

    /// Counts an eviction that this became of.
    pub(super) fn count_eviction(&self, outcome: EvictionOutcome) {
        self.evictions.get_or_create(&EvictionLabels { outcome }).inc();
    }

    /// Shows what `pods` holds from now on.
    pub(super) fn read(&self, pods: &PodReader) {
        // Set before: the agent has one table.
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
            "Pods that are known",
            None,
            pods.metric_type(),
        )?;
        pods.encode(descriptor)?;

        // Before the first sign of life there is no such time.
        let Some(silence) = reader.silence() else { return Ok(()) };
        let silence = ConstGauge::new(silence.as_secs_f64());
        let descriptor = encoder.encode_descriptor(
            "kiam_cluster_silence_seconds",
            "Time since the most silent watch of pods, namespaces and ServiceAccounts gave a sign of life",
            None,
            silence.metric_type(),
        )?;
        silence.encode(descriptor)
    }
}

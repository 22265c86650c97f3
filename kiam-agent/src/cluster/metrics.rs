//! What the feeds count.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// How a list ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Outcome {
    /// It was applied.
    Ok,
    /// It failed.
    Error,
}

/// Why a watch was opened anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Restart {
    /// The server ended it, as it does every few minutes.
    Ended,
    /// An error.
    Error,
    /// The version was too old (410).
    Expired,
    /// No event and no bookmark for too long.
    Stalled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Lists {
    resource: &'static str,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Restarts {
    resource: &'static str,
    reason: Restart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    resource: &'static str,
}

/// The feeds' metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    lists: Family<Lists, Counter>,
    restarts: Family<Restarts, Counter>,
    events: Family<Kind, Counter>,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let Self { lists, restarts, events } = metrics.clone();
        registry.register("kiam_cluster_lists", "Lists from the Kubernetes API", lists);
        registry.register(
            "kiam_cluster_watch_restarts",
            "Watches of the Kubernetes API that were opened anew",
            restarts,
        );
        registry.register("kiam_cluster_events", "Watch events from the Kubernetes API", events);
        metrics
    }

    pub(super) fn listed(&self, resource: &'static str, outcome: Outcome) {
        self.lists.get_or_create(&Lists { resource, outcome }).inc();
    }

    pub(super) fn restarted(&self, resource: &'static str, reason: Restart) {
        self.restarts.get_or_create(&Restarts { resource, reason }).inc();
    }

    pub(super) fn event(&self, resource: &'static str) {
        self.events.get_or_create(&Kind { resource }).inc();
    }
}

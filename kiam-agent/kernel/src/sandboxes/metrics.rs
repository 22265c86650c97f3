//! The metrics of sandboxes.

use prometheus_client::{
    metrics::{
        counter::Counter,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::{SandboxReader, State};
use kiam_core::telemetry::{ScrapedKind, register, register_scraped};

/// The metrics of sandboxes.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) ready: Histogram,
    pub(super) lost: Counter,
    pub(super) unwatched: Gauge,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`, with the numbers of pods in each of the `states`.
    #[must_use]
    pub fn register(registry: &mut Registry, states: SandboxReader) -> Self {
        let metrics = Self {
            ready: Histogram::new(exponential_buckets(0.000_5, 2.0, 15)),
            lost: register(
                registry,
                "kiam_sandboxes_changes_lost",
                "Overflows of the kernel's queue of cgroup changes, after which all pods were scanned",
            ),
            unwatched: register(
                registry,
                "kiam_sandboxes_unwatched",
                "Pods' cgroups that the system does not let the agent watch, so that only sweeps find their changes",
            ),
        };
        registry.register(
            "kiam_sandboxes_ready_seconds",
            "Time from when a process of a pod was noticed until its pod listener was open",
            metrics.ready.clone(),
        );
        let help = "Pods with a cgroup, by state; ready pods have a pod listener";
        let read = move || {
            let counts = states.counts();
            State::NAMES.map(|name| (name, counts.get(name).copied().unwrap_or(0))).into()
        };
        register_scraped(registry, ("kiam_sandboxes", help), ScrapedKind::Gauge, "state", read);
        metrics
    }
}

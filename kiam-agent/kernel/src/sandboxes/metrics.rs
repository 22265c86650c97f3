//! The metrics of sandboxes.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        counter::Counter,
        gauge::{ConstGauge, Gauge},
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

use super::{SandboxReader, State};

/// The metrics of sandboxes.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) ready: Histogram,
    pub(super) lost: Counter,
    pub(super) unwatched: Gauge,
    scrape: Scrape,
}

/// The collector of pods' states, once these exist.
#[derive(Clone, Debug, Default)]
struct Scrape(Arc<OnceLock<SandboxReader>>);

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        let buckets = exponential_buckets(0.000_5, 2.0, 15);
        Self {
            ready: Histogram::new(buckets),
            lost: Counter::default(),
            unwatched: Gauge::default(),
            scrape: Scrape::default(),
        }
    }
}

impl Metrics {
    /// Adds them to `registry`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_sandboxes_ready_seconds",
            "Time from when a process of a pod was noticed until its pod listener was open",
            metrics.ready.clone(),
        );
        registry.register(
            "kiam_sandboxes_changes_lost",
            "Overflows of the kernel's queue of cgroup changes, after which all pods were scanned",
            metrics.lost.clone(),
        );
        registry.register(
            "kiam_sandboxes_unwatched",
            "Pods' cgroups that the system does not let the agent watch, so that only sweeps find their changes",
            metrics.unwatched.clone(),
        );
        registry.register_collector(Box::new(metrics.scrape.clone()));
        metrics
    }

    /// Collects from `states` from now on.
    pub(super) fn read(&self, states: &SandboxReader) {
        // An agent has one reader; it is set once.
        let _ = self.scrape.0.set(states.clone());
    }
}

// === impl Scrape ===

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(states) = self.0.get() else { return Ok(()) };
        let counts = states.counts();
        let kind = ConstGauge::new(0_u64).metric_type();
        let help = "Pods with a cgroup, by state; ready pods have a pod listener";
        let mut family = encoder.encode_descriptor("kiam_sandboxes", help, None, kind)?;
        for name in State::NAMES {
            let labels = [("state", name)];
            let encoder = family.encode_family(&labels)?;
            ConstGauge::new(counts.get(name).copied().unwrap_or(0)).encode(encoder)?;
        }
        Ok(())
    }
}

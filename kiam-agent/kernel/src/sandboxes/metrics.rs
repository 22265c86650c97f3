//! How fast sandboxes get their listeners, and how many have them.

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

/// What became of sandboxes.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) ready: Histogram,
    pub(super) lost: Counter,
    pub(super) unwatched: Gauge,
    scrape: Scrape,
}

/// State that is read when it is asked for, once there is some.
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
            "Time from when a process of a pod was noticed until listeners were open in its network namespace",
            metrics.ready.clone(),
        );
        registry.register(
            "kiam_sandboxes_changes_lost",
            "How often the kernel had more changes of cgroups than it could keep, so that all were looked at",
            metrics.lost.clone(),
        );
        registry.register(
            "kiam_sandboxes_unwatched",
            "Watches of pods' cgroups that the system refuses, so that changes of these are found by sweeps alone",
            metrics.unwatched.clone(),
        );
        registry.register_collector(Box::new(metrics.scrape.clone()));
        metrics
    }

    /// Shows what `states` holds from now on.
    pub(super) fn read(&self, states: &SandboxReader) {
        // Set before: the agent has one.
        let _ = self.scrape.0.set(states.clone());
    }
}

// === impl Scrape ===

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(states) = self.0.get() else { return Ok(()) };
        let counts = states.counts();
        let kind = ConstGauge::new(0_u64).metric_type();
        let help = "Pods with a cgroup, by where they stand; those that are ready have listeners";
        let mut family = encoder.encode_descriptor("kiam_sandboxes", help, None, kind)?;
        for name in State::NAMES {
            let labels = [("state", name)];
            let encoder = family.encode_family(&labels)?;
            ConstGauge::new(counts.get(name).copied().unwrap_or(0)).encode(encoder)?;
        }
        Ok(())
    }
}

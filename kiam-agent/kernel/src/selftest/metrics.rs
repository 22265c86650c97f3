//! The self-test's metrics.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Failure, Part};

/// The self-test's metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    runs: Family<Labels, Counter>,
    failing: Family<PartLabel, Gauge>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: RunOutcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum RunOutcome {
    Passed,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabel {
    part: Part,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_selftest_runs",
            "Self-tests that the agent ran, by outcome",
            metrics.runs.clone(),
        );
        registry.register(
            "kiam_selftest_failing",
            "Parts of the last self-test that failed (1) and did not (0)",
            metrics.failing.clone(),
        );
        metrics
    }

    pub(super) fn count(&self, failures: &[Failure]) {
        let outcome = if failures.is_empty() { RunOutcome::Passed } else { RunOutcome::Failed };
        self.runs.get_or_create(&Labels { outcome }).inc();
        for part in Part::ALL {
            let fails = failures.iter().any(|failure| failure.part == part);
            self.failing.get_or_create(&PartLabel { part }).set(fails.into());
        }
    }
}

//! The self-test's metrics.

use prometheus_client::{
    encoding::EncodeLabelValue,
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

use super::{Failure, Part};
use kiam_core::telemetry::ByLabel;

/// The self-test's metrics.
#[derive(Clone, Debug)]
pub(super) struct Metrics {
    runs: ByLabel<RunOutcome, Counter>,
    failing: ByLabel<Part, Gauge>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum RunOutcome {
    Passed,
    Failed,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    #[must_use]
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            runs: ByLabel::register(
                registry,
                "kiam_selftest_runs",
                "Self-tests that the agent ran, by outcome",
                "outcome",
            ),
            failing: ByLabel::register(
                registry,
                "kiam_selftest_failing",
                "Parts of the last self-test that failed (1) and did not (0)",
                "part",
            ),
        };
        metrics.runs.show([RunOutcome::Passed, RunOutcome::Failed]);
        metrics
    }

    pub(super) fn count(&self, failures: &[Failure]) {
        let outcome = if failures.is_empty() { RunOutcome::Passed } else { RunOutcome::Failed };
        self.runs.of(outcome).inc();
        for part in Part::ALL {
            let fails = failures.iter().any(|failure| failure.part == part);
            self.failing.of(part).set(fails.into());
        }
    }
}

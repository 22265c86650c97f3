//! What the prefetcher counts.

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::Registry,
};

use super::ErrorClass;
use crate::telemetry::Statsd;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Ok,
    Retryable,
    Throttled,
    Denied,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: Outcome,
}

/// The prefetcher's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    issued: Family<Labels, Counter>,
    duration: Histogram,
    statsd: Statsd,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry, statsd: Statsd) -> Self {
        let buckets = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let metrics = Self { issued: Family::default(), duration: Histogram::new(buckets), statsd };
        let Self { issued, duration, .. } = metrics.clone();
        registry.register(
            "kiam_credentials_issued",
            "Requests for credentials, by outcome",
            issued,
        );
        registry.register(
            "kiam_credentials_issue_duration_seconds",
            "How long requests for credentials took",
            duration,
        );
        metrics
    }

    pub(super) fn issued(&self, took: Duration, error: Option<ErrorClass>) {
        let outcome = match error {
            None => Outcome::Ok,
            Some(ErrorClass::Retryable) => Outcome::Retryable,
            Some(ErrorClass::Throttled) => Outcome::Throttled,
            Some(ErrorClass::Denied) => Outcome::Denied,
        };
        self.issued.get_or_create(&Labels { outcome }).inc();
        self.duration.observe(took.as_secs_f64());
        self.statsd.timing("aws.assumeRole", took);
    }
}

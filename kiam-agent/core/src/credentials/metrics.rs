//! The prefetcher's metrics.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelValue,
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{CredentialReader, ErrorClass, Limit, Overdue, Summary};
use crate::telemetry::{ByLabel, ScrapedKind, Statsd, register, register_scraped};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Ok,
    Retryable,
    Throttled,
    TooLong,
    Denied,
}

/// The prefetcher's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    issued: ByLabel<Outcome, Counter>,
    waiting: ByLabel<Limit, Gauge>,
    rate: Gauge<f64, AtomicU64>,
    duration: Histogram,
    ready: Histogram,
    statsd: Statsd,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry, statsd: Statsd) -> Self {
        let metrics = Self {
            issued: ByLabel::register(
                registry,
                "kiam_credentials_issued",
                "Calls to STS for credentials, by outcome",
                "outcome",
            ),
            waiting: ByLabel::register(
                registry,
                "kiam_credentials_waiting",
                "Credentials that are due but not requested yet, by reason",
                "reason",
            ),
            rate: register(
                registry,
                "kiam_credentials_calls_per_second",
                "Calls to STS that are allowed per second: --sts-rate, or less while STS throttles an account",
            ),
            duration: Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]),
            // A pod's first container starts a second or more after the pod was assigned.
            ready: Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]),
            statsd,
        };
        registry.register(
            "kiam_credentials_ready_seconds",
            "Time from when the agent saw a pod assigned to the node until its credentials were cached",
            metrics.ready.clone(),
        );
        registry.register(
            "kiam_credentials_issue_duration_seconds",
            "Duration of calls to STS for credentials",
            metrics.duration.clone(),
        );
        use Outcome::{Denied, Ok, Retryable, Throttled, TooLong};
        metrics.issued.show([Ok, Retryable, Throttled, TooLong, Denied]);
        metrics
    }

    /// Counts the entries of `credentials` at each scrape.
    pub fn register_states(registry: &mut Registry, credentials: CredentialReader) {
        let reader = credentials.clone();
        let metric = ("kiam_credentials_held", "Requested credentials, by state");
        register_scraped(registry, metric, ScrapedKind::Gauge, "state", move || {
            let Summary { ready, pending, failed, retried, .. } = reader.summary();
            let counts = [
                ("ready", ready),
                ("pending", pending),
                ("failed", retried),
                ("denied", failed - retried),
            ];
            counts.map(|(state, count)| (state, count as u64)).into()
        });
        let help = "Cached credentials with less than a quarter of their life left, by what the last renewal met";
        let metric = ("kiam_credentials_overdue", help);
        register_scraped(registry, metric, ScrapedKind::Gauge, "renewal", move || {
            let Overdue { denied, throttled, unanswered } = credentials.summary().overdue;
            let counts = [("denied", denied), ("throttled", throttled), ("unanswered", unanswered)];
            counts.map(|(renewal, count)| (renewal, count as u64)).into()
        });
    }

    /// Sets the gauges of waiting keys to the counts of `limits`.
    pub(super) fn waiting<'a>(&self, limits: impl Iterator<Item = &'a Limit> + Clone) {
        for reason in Limit::ALL {
            let count = limits.clone().filter(|limit| **limit == reason).count();
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.waiting.of(reason).set(count);
        }
    }

    /// Sets the gauge of the call rate.
    pub(super) fn rate(&self, per_second: f64) {
        self.rate.set(per_second);
    }

    /// Records that a pod `waited` for its first credentials.
    pub(super) fn ready(&self, waited: Duration) {
        self.ready.observe(waited.as_secs_f64());
    }

    pub(super) fn issued(&self, took: Duration, error: Option<ErrorClass>) {
        let outcome = match error {
            None => Outcome::Ok,
            Some(ErrorClass::Retryable) => Outcome::Retryable,
            Some(ErrorClass::Throttled) => Outcome::Throttled,
            Some(ErrorClass::TooLong) => Outcome::TooLong,
            Some(ErrorClass::Denied | ErrorClass::Refused) => Outcome::Denied,
        };
        self.issued.of(outcome).inc();
        self.duration.observe(took.as_secs_f64());
        self.statsd.timing("aws.assumeRole", took);
    }
}

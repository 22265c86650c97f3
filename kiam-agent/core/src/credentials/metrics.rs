//! The prefetcher's metrics.

use std::{fmt, sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric as _},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use super::{CredentialReader, ErrorClass, Limit, Summary};
use crate::telemetry::Statsd;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Ok,
    Retryable,
    Throttled,
    TooLong,
    Denied,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WaitingLabels {
    reason: Limit,
}

/// The prefetcher's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    issued: Family<Labels, Counter>,
    waiting: Family<WaitingLabels, Gauge>,
    rate: Gauge<f64, AtomicU64>,
    duration: Histogram,
    ready: Histogram,
    statsd: Statsd,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry, statsd: Statsd) -> Self {
        let buckets = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
        let metrics = Self {
            issued: Family::default(),
            waiting: Family::default(),
            rate: Gauge::default(),
            duration: Histogram::new(buckets),
            // A pod's first container starts a second or more after the pod was assigned.
            ready: Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]),
            statsd,
        };
        let Self { issued, waiting, rate, duration, ready, .. } = metrics.clone();
        registry.register(
            "kiam_credentials_ready_seconds",
            "Time from when the agent saw a pod assigned to the node until its credentials were cached",
            ready,
        );
        registry.register(
            "kiam_credentials_waiting",
            "Credentials that are due but not requested yet, by reason",
            waiting,
        );
        registry.register(
            "kiam_credentials_calls_per_second",
            "Calls to STS that are allowed per second: --sts-rate, or less while STS throttles an account",
            rate,
        );
        registry.register(
            "kiam_credentials_issued",
            "Calls to STS for credentials, by outcome",
            issued.clone(),
        );
        // An increase from nothing is none to Prometheus.
        use Outcome::{Denied, Ok, Retryable, Throttled, TooLong};
        for outcome in [Ok, Retryable, Throttled, TooLong, Denied] {
            issued.get_or_create(&Labels { outcome }).inc_by(0);
        }
        registry.register(
            "kiam_credentials_issue_duration_seconds",
            "Duration of calls to STS for credentials",
            duration,
        );
        metrics
    }

    /// Sets the gauges of waiting keys to the counts of `limits`.
    pub(super) fn waiting<'a>(&self, limits: impl Iterator<Item = &'a Limit> + Clone) {
        for reason in Limit::ALL {
            let count = limits.clone().filter(|limit| **limit == reason).count();
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.waiting.get_or_create(&WaitingLabels { reason }).set(count);
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
        self.issued.get_or_create(&Labels { outcome }).inc();
        self.duration.observe(took.as_secs_f64());
        self.statsd.timing("aws.assumeRole", took);
    }
}

/// The collector of `kiam_credentials_held`, which counts at each scrape.
pub struct CredentialStates(CredentialReader);

// === impl CredentialStates ===

impl CredentialStates {
    /// A collector that counts the entries of `reader`.
    #[must_use]
    pub fn new(reader: CredentialReader) -> Self {
        Self(reader)
    }
}

impl fmt::Debug for CredentialStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CredentialStates")
    }
}

impl Collector for CredentialStates {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Summary { ready, pending, failed, .. } = self.0.summary();
        let mut family = encoder.encode_descriptor(
            "kiam_credentials_held",
            "Requested credentials, by state",
            None,
            ConstGauge::new(0_u64).metric_type(),
        )?;
        for (state, count) in [("ready", ready), ("pending", pending), ("failed", failed)] {
            let labels = [("state", state)];
            let encoder = family.encode_family(&labels)?;
            ConstGauge::new(count as u64).encode(encoder)?;
        }
        Ok(())
    }
}

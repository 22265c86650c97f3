//! The audit's metrics.

use prometheus_client::{
    encoding::EncodeLabelValue, metrics::counter::Counter, registry::Registry,
};

use super::unusual::Reason;
use kiam_core::telemetry::{ByLabel, register};

/// Why a hand-out has no line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Loss {
    /// The pod's share of lines was used up.
    Share,
    /// Lines came faster than they were written.
    Queue,
    /// Writing failed: the disk is full, or the file can't be opened.
    Write,
}

/// The audit's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    lines: Counter,
    dropped: ByLabel<Loss, Counter>,
    unusual: ByLabel<Reason, Counter>,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            lines: register(registry, "kiam_audit_lines", "Lines that the audit has written"),
            dropped: ByLabel::register(
                registry,
                "kiam_audit_dropped",
                "Hand-outs of credentials without a line in the audit, by reason",
                "reason",
            ),
            unusual: ByLabel::register(
                registry,
                "kiam_audit_unusual",
                "Hand-outs of credentials that are unusual, by reason",
                "reason",
            ),
        };
        metrics.dropped.show([Loss::Share, Loss::Queue, Loss::Write]);
        metrics.unusual.show([Reason::Shell, Reason::Container]);
        metrics
    }

    pub(super) fn written(&self) {
        self.lines.inc();
    }

    pub(super) fn dropped(&self, why: Loss, count: u64) {
        self.dropped.of(why).inc_by(count);
    }

    pub(super) fn unusual(&self, reason: Reason) {
        self.unusual.of(reason).inc();
    }
}

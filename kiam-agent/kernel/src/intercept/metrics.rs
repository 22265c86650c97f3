//! The kernel programs' counters, which are read at each scrape.

use std::{fmt, sync::Arc};

use aya::maps::{MapData, PerCpuArray};
use kiam_common::counters::VerdictReason;
use prometheus_client::{
    encoding::EncodeLabelValue, metrics::counter::Counter, registry::Registry,
};

use crate::intercept::Drift;
use kiam_core::telemetry::{ByLabel, ScrapedKind, register_scraped};

/// The kernel programs' verdicts about IMDS traffic.
#[derive(Clone)]
pub struct Verdicts(Arc<PerCpuArray<MapData, u64>>);

/// The counter of restored programs and pins.
#[derive(Clone, Debug)]
pub struct RestoredMetrics(ByLabel<What, Counter>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum What {
    /// A detached program.
    Program,
    /// A removed pin.
    Pin,
}

// === impl RestoredMetrics ===

impl RestoredMetrics {
    /// Adds it to `registry`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let restored = ByLabel::register(
            registry,
            "kiam_intercept_restored",
            "Kernel programs and pins that were removed and that the agent restored, by kind",
            "what",
        );
        restored.show([What::Program, What::Pin]);
        Self(restored)
    }

    /// Counts what was `restored`.
    pub fn count(&self, restored: &Drift) {
        let counted =
            [(What::Program, restored.detached.len()), (What::Pin, restored.unpinned.len())];
        for (what, count) in counted.into_iter().filter(|(_, count)| *count > 0) {
            self.0.of(what).inc_by(count as u64);
        }
    }
}

// === impl Verdicts ===

impl Verdicts {
    pub(super) fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self(Arc::new(map))
    }

    /// Adds `kiam_intercept_verdicts_total` to `registry`, which is read at each scrape.
    pub fn register(&self, registry: &mut Registry) {
        let verdicts = self.clone();
        let help = "Verdicts of the kernel programs about IMDS connects and datagrams, by verdict";
        let metric = ("kiam_intercept_verdicts", help);
        register_scraped(registry, metric, ScrapedKind::Counter, "verdict", move || {
            let of = |reason: &VerdictReason| (reason.name(), verdicts.count(*reason));
            VerdictReason::COUNTED.iter().map(of).collect()
        });
    }

    /// The number of verdicts for `reason` since the maps were first pinned.
    #[must_use]
    pub fn count(&self, reason: VerdictReason) -> u64 {
        self.0.get(&(reason as u32), 0).map_or(0, |cpus| cpus.iter().sum())
    }
}

impl fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verdicts")
    }
}

//! The kernel programs' counters, which are read at each scrape.

use std::{fmt, sync::Arc};

use aya::maps::{MapData, PerCpuArray};
use kiam_common::counters::VerdictReason;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric as _},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
    },
    registry::{Registry, Unit},
};

use crate::intercept::Drift;

/// The collector of `kiam_intercept_verdicts_total`: the kernel programs' verdicts about IMDS traffic.
#[derive(Clone)]
pub struct Verdicts(Arc<PerCpuArray<MapData, u64>>);

/// The counter of restored programs and pins.
#[derive(Clone, Debug, Default)]
pub struct RestoredMetrics(Family<Labels, Counter>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    what: What,
}

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
        let metrics = Self::default();
        registry.register(
            "kiam_intercept_restored",
            "Kernel programs and pins that were removed and that the agent restored, by kind",
            metrics.0.clone(),
        );
        // An increase from nothing is none to Prometheus.
        for what in [What::Program, What::Pin] {
            metrics.0.get_or_create(&Labels { what }).inc_by(0);
        }
        metrics
    }

    /// Counts what was `restored`.
    pub fn count(&self, restored: &Drift) {
        let counted =
            [(What::Program, restored.detached.len()), (What::Pin, restored.unpinned.len())];
        for (what, count) in counted.into_iter().filter(|(_, count)| *count > 0) {
            self.0.get_or_create(&Labels { what }).inc_by(count as u64);
        }
    }
}

// === impl Verdicts ===

impl Verdicts {
    pub(super) fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self(Arc::new(map))
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

impl Collector for Verdicts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let none: Option<&Unit> = None;
        let counter = ConstCounter::new(0_u64);
        let mut family = encoder.encode_descriptor(
            "kiam_intercept_verdicts",
            "Verdicts of the kernel programs about IMDS connects and datagrams, by verdict",
            none,
            counter.metric_type(),
        )?;
        for reason in VerdictReason::COUNTED {
            let labels = [("verdict", reason.name())];
            let encoder = family.encode_family(&labels)?;
            ConstCounter::new(self.count(reason)).encode(encoder)?;
        }
        Ok(())
    }
}

//! The kernel's own counts, read when they are asked for.

use std::{fmt, sync::Arc};

use aya::maps::{MapData, PerCpuArray};
use kiam_common::counters::Reason;
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

/// `kiam_intercept_verdicts_total`: what the kernel programs decided about IMDS traffic.
#[derive(Clone)]
pub struct Verdicts(Arc<PerCpuArray<MapData, u64>>);

/// What the agent put back that somebody had taken away.
#[derive(Clone, Debug, Default)]
pub struct RestoredMetrics(Family<Labels, Counter>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum What {
    /// A program was attached no longer.
    Program,
    /// A pin was gone.
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
            "Kernel programs and pins that somebody had taken away and the agent put back, by what they are",
            metrics.0.clone(),
        );
        // An increase from nothing is none to Prometheus.
        for what in [What::Program, What::Pin] {
            metrics.0.get_or_create(&Labels { what }).inc_by(0);
        }
        metrics
    }

    /// Counts what is back.
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

    /// How often `reason` was the answer, since the maps were first pinned.
    #[must_use]
    pub fn count(&self, reason: Reason) -> u64 {
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
            "What the kernel programs decided about IMDS connects and datagrams, by verdict",
            none,
            counter.metric_type(),
        )?;
        for reason in Reason::COUNTED {
            let labels = [("verdict", reason.name())];
            let encoder = family.encode_family(&labels)?;
            ConstCounter::new(self.count(reason)).encode(encoder)?;
        }
        Ok(())
    }
}

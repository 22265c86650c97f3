//! The kernel's own counts, read when they are asked for.

use std::{fmt, sync::Arc};

use aya::maps::{MapData, PerCpuArray};
use kiam_common::counters::Reason;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::counter::ConstCounter,
    registry::Unit,
};

/// `kiam_intercept_verdicts_total`: what the kernel programs decided about IMDS traffic.
#[derive(Clone)]
pub struct Verdicts(Arc<PerCpuArray<MapData, u64>>);

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

//! What parts register their Prometheus metrics with.

use std::{fmt, hash::Hash};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelValue, EncodeMetric as _},
    metrics::{counter::ConstCounter, family::Family, gauge::ConstGauge},
    registry::{Metric, Registry},
};

/// Adds a metric to `registry`.
pub fn register<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// A metric for each value of one label.
#[derive(Clone, Debug)]
pub struct ByLabel<L, M> {
    label: &'static str,
    family: Family<[(&'static str, L); 1], M>,
}

/// The kind of values that are read at each scrape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrapedKind {
    /// They only rise; Prometheus' name ends in `_total`.
    Counter,
    /// They rise and fall.
    Gauge,
}

/// Values that are read at each scrape, each with the value of the label that it is of.
type Read = Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>;

struct Scraped {
    name: &'static str,
    help: &'static str,
    kind: ScrapedKind,
    label: &'static str,
    read: Read,
}

// === impl ByLabel ===

impl<L, M> ByLabel<L, M>
where
    L: EncodeLabelValue + Clone + Eq + Hash + fmt::Debug + Send + Sync + 'static,
    M: Metric + Clone + Default,
{
    /// Adds the metrics to `registry`.
    pub fn register(registry: &mut Registry, name: &str, help: &str, label: &'static str) -> Self
    where
        Family<[(&'static str, L); 1], M>: Metric,
    {
        Self { label, family: register(registry, name, help) }
    }

    /// The metric of `value`.
    pub fn of(&self, value: L) -> M {
        self.family.get_or_create_owned(&[(self.label, value)])
    }

    /// Shows the metrics of these values from now on: an increase from nothing is none to Prometheus.
    pub fn show(&self, values: impl IntoIterator<Item = L>) {
        values.into_iter().for_each(|value| drop(self.of(value)));
    }
}

/// Adds values to `registry` that `read` reads at each scrape, with the value of `label` that each is of.
pub fn register_scraped(
    registry: &mut Registry,
    (name, help): (&'static str, &'static str),
    kind: ScrapedKind,
    label: &'static str,
    read: impl Fn() -> Vec<(&'static str, u64)> + Send + Sync + 'static,
) {
    let read = Box::new(read);
    registry.register_collector(Box::new(Scraped { name, help, kind, label, read }));
}

// === impl Scraped ===

impl fmt::Debug for Scraped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Collector for Scraped {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let kind = match self.kind {
            ScrapedKind::Counter => ConstCounter::new(0_u64).metric_type(),
            ScrapedKind::Gauge => ConstGauge::new(0_u64).metric_type(),
        };
        let mut family = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        for (value, count) in (self.read)() {
            let labels = [(self.label, value)];
            let encoder = family.encode_family(&labels)?;
            match self.kind {
                ScrapedKind::Counter => ConstCounter::new(count).encode(encoder)?,
                ScrapedKind::Gauge => ConstGauge::new(count).encode(encoder)?,
            }
        }
        Ok(())
    }
}

//! The metrics of the agent as a whole: its version, its clock, and whether it is ready.

use std::{fmt, time::UNIX_EPOCH};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
    registry::Registry,
};

use kiam_core::{clock::Clock, lifecycle::Readiness};

/// What is read at each scrape.
struct Scrape {
    readiness: Readiness,
    clock: Clock,
}

/// Adds the agent's own metrics to `registry`.
pub fn register_metrics(registry: &mut Registry, readiness: Readiness, clock: Clock) {
    registry.register_collector(Box::new(Scrape { readiness, clock }));
}

// === impl Scrape ===

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let gauges = [
            (
                "kiam_agent_ready",
                "Whether the agent is ready (1) or a condition of /ready is pending (0)",
                f64::from(u8::from(self.readiness.is_ready())),
            ),
            (
                "kiam_agent_time_seconds",
                "The agent's clock, in seconds since 1970: compare it with the time of the scrape",
                self.clock.now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            let family = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(family)?;
        }
        let help = "The agent's version and commit; always 1";
        let info = ConstGauge::new(1_u64);
        let mut family =
            encoder.encode_descriptor("kiam_build_info", help, None, info.metric_type())?;
        let labels = [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("KIAM_COMMIT"))];
        info.encode(family.encode_family(&labels)?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn clock_and_readiness_are_those_of_the_scrape() {
        let readiness = Readiness::default();
        let latch = readiness.latch("serving pods");
        let clock = Clock::simulated(UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let mut registry = Registry::default();
        register_metrics(&mut registry, readiness, clock);
        let scraped = || {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            text
        };
        assert!(scraped().contains("\nkiam_agent_ready 0"), "{}", scraped());
        latch.set();
        let text = scraped();
        assert!(text.contains("\nkiam_agent_ready 1"), "{text}");
        assert!(text.contains("\nkiam_agent_time_seconds 1700000000."), "{text}");
        let version = format!("kiam_build_info{{version=\"{}\",", env!("CARGO_PKG_VERSION"));
        assert!(text.contains(&version), "{text}");
    }
}

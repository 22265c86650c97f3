//! Reports connects that are denied because the kernel could not record them; a metric alone would be overlooked.

use std::time::Duration;

use kiam_common::counters::VerdictReason;
use tracing::warn;

use super::Verdicts;
use kiam_core::{
    lifecycle::{Drain, Latch, Readiness},
    telemetry::LogLimit,
    ticks::ticks,
};

/// The time between two comparisons of the counts.
const PERIOD: Duration = Duration::from_secs(5);
/// A shortage is logged at most once in this time.
const LOG_PERIOD: Duration = Duration::from_secs(60);
/// Periods in a row with such denials until the agent is not ready: a brief shortage ends sooner.
const LASTING: u32 = 3;
/// Periods in a row without any until the agent is ready again.
const QUIET: u32 = 6;

/// Logs that pods' connects are denied because the kernel's tables, or memory, are full. The agent is not ready while that
/// lasts.
pub struct Shortage {
    verdicts: Verdicts,
    latch: Latch,
    counted: u64,
    log: LogLimit<()>,
    trend: Trend,
}

/// The periods with denials, or without any, that came last.
#[derive(Debug, Default, PartialEq, Eq)]
struct Trend {
    short: u32,
    quiet: u32,
}

// === impl Shortage ===

impl Shortage {
    /// Watches the counts of `verdicts`.
    #[must_use]
    pub fn new(verdicts: Verdicts, readiness: &Readiness) -> Self {
        let latch = readiness.latch("room for pods' connections in the kernel");
        latch.set();
        let counted = verdicts.count(VerdictReason::Full);
        let (log, trend) = (LogLimit::new(LOG_PERIOD), Trend::default());
        Self { verdicts, latch, counted, log, trend }
    }

    /// Runs until the drain begins.
    pub async fn run(mut self, mut drain: Drain) {
        let mut ticks = ticks(PERIOD);
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => self.compare(),
            }
        }
    }

    fn compare(&mut self) {
        let counted = self.verdicts.count(VerdictReason::Full);
        let denied = counted.saturating_sub(self.counted);
        self.counted = counted;
        if denied > 0 && self.log.admit(()).is_some() {
            warn!(
                denied,
                "Pods' connects are denied: the kernel has no room for more pods with connections, or no memory"
            );
        }
        match self.trend.after(denied > 0) {
            Some(true) => self.latch.clear(),
            Some(false) => self.latch.set(),
            None => {}
        }
    }
}

// === impl Trend ===

impl Trend {
    /// Whether there is a lasting shortage after one more period, `short` or not; `None`: as before.
    fn after(&mut self, short: bool) -> Option<bool> {
        if short {
            (self.short, self.quiet) = (self.short + 1, 0);
            (self.short >= LASTING).then_some(true)
        } else {
            (self.short, self.quiet) = (0, self.quiet + 1);
            (self.quiet >= QUIET).then_some(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lasting_shortage_takes_readiness_away_and_only_a_long_quiet_gives_it_back() {
        let mut trend = Trend::default();
        let mut periods = |short, count| (0..count).fold(None, |_, _| trend.after(short));
        assert_eq!(periods(true, LASTING - 1), None);
        assert_eq!(periods(false, 1), None);
        assert_eq!(periods(true, LASTING - 1), None);
        assert_eq!(periods(true, 1), Some(true));
        assert_eq!(periods(false, QUIET - 1), None);
        assert_eq!(periods(false, 1), Some(false));
    }
}

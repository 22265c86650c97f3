//! The only place that reads the wall clock.
//!
//! Schedules elsewhere are pure functions of (now, issued, expires); they are given `now` by a
//! [`Clock`], which tests can start anywhere, pause (`tokio::time::pause`) and step.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

/// A wall clock: the system's, or a simulated one.
#[derive(Clone, Debug)]
pub struct Clock(TimeSource);

#[derive(Clone, Debug)]
enum TimeSource {
    System,
    /// Moves with tokio's clock, so it stands still while that is paused.
    Simulated {
        epoch: SystemTime,
        start: Instant,
        /// Seconds that tests have stepped the wall clock by; negative is back.
        step_secs: Arc<AtomicI64>,
    },
}

// === impl Clock ===

impl Clock {
    /// The system's own clock.
    #[must_use]
    pub fn system() -> Self {
        Self(TimeSource::System)
    }

    /// A clock that shows `epoch` now and moves with tokio's (possibly paused) time.
    #[must_use]
    pub fn simulated(epoch: SystemTime) -> Self {
        Self(TimeSource::Simulated { epoch, start: Instant::now(), step_secs: Arc::default() })
    }

    /// The wall-clock time, which may step forward and back.
    #[must_use]
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the wall clock"
    )]
    pub fn now(&self) -> SystemTime {
        match &self.0 {
            TimeSource::System => SystemTime::now(),
            TimeSource::Simulated { epoch, start, step_secs } => {
                let steady = *epoch + start.elapsed();
                let step = step_secs.load(Ordering::Relaxed);
                let distance = Duration::from_secs(step.unsigned_abs());
                if step < 0 { steady - distance } else { steady + distance }
            }
        }
    }

    /// Steps a simulated clock by `seconds` (negative: back), as an administrator or NTP may. Does nothing to the
    /// system's clock.
    pub fn step(&self, seconds: i64) {
        if let TimeSource::Simulated { step_secs, .. } = &self.0 {
            step_secs.fetch_add(seconds, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn simulated_clock_moves_with_paused_time_and_steps() {
        let epoch = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = Clock::simulated(epoch);
        assert_eq!(clock.now(), epoch);
        tokio::time::advance(Duration::from_secs(7)).await;
        assert_eq!(clock.now(), epoch + Duration::from_secs(7));
        clock.step(-3600);
        assert_eq!(clock.now(), epoch + Duration::from_secs(7) - Duration::from_secs(3600));
    }
}

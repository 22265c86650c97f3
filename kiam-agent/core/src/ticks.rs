//! Periodic work of an idle process, all of it at the same moments.
//!
//! A timer of some seconds wakes a thread three times, as it passes through the levels of the runtime's timer wheel. Timers
//! that end at the same moment wake it three times together.

use std::{sync::OnceLock, time::Duration};

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

/// Ticks now, and then at the multiples of `period` since the process began. A late tick moves no later one.
#[must_use]
pub fn ticks(period: Duration) -> Interval {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    ticks_since(*BEGAN.get_or_init(Instant::now), period)
}

fn ticks_since(began: Instant, period: Duration) -> Interval {
    let now = Instant::now();
    let over = now.saturating_duration_since(began).as_nanos() % period.as_nanos();
    let last = now - Duration::from_nanos(u64::try_from(over).unwrap_or_default());
    let mut ticks = interval_at(last, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ticks_come_at_once_and_then_together() {
        let (period, began) = (Duration::from_secs(5), Instant::now());
        let at = |seconds| Duration::from_secs(seconds);
        let mut first = ticks_since(began, period);
        first.tick().await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        sleep(Duration::from_millis(3700)).await;
        let mut second = ticks_since(began, 2 * period);
        second.tick().await;
        assert_eq!(began.elapsed(), Duration::from_millis(3700));
        first.tick().await;
        assert_eq!(began.elapsed(), at(5));
        first.tick().await;
        second.tick().await;
        assert_eq!(began.elapsed(), at(10));
        advance(at(7)).await;
        first.tick().await;
        assert_eq!(began.elapsed(), at(17), "it is late");
        first.tick().await;
        assert_eq!(began.elapsed(), at(20));
    }
}

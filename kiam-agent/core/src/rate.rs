//! Limits the rate of calls, requests and Events.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

/// A rate: `burst` times at once, then once a `period`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The number of times at once; at least 1.
    pub burst: u32,
    /// The time until one more.
    pub period: Duration,
}

/// A token bucket, stored as the time when it will be full again. A new one is full.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    full_at: Option<Instant>,
}

/// A bucket that many threads take tokens from, without a lock.
#[derive(Debug)]
pub struct SharedBucket {
    began: Instant,
    /// As in [`Bucket`], in nanoseconds since `began`.
    full_at: AtomicU64,
}

// === impl Rate ===

impl Rate {
    /// The rate of `count` times a second, which must be at least 1.
    #[must_use]
    pub fn per_second(count: u32, burst: u32) -> Self {
        Self { burst, period: Duration::from_secs(1) / count }
    }
}

// === impl Bucket ===

impl Bucket {
    /// The time until there is a token.
    #[must_use]
    pub fn wait(&self, rate: Rate, now: Instant) -> Duration {
        let missing = self.full_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        (missing + rate.period).saturating_sub(rate.period * rate.burst)
    }

    /// Takes a token, whether there is one or not.
    pub fn take(&mut self, rate: Rate, now: Instant) {
        let from = self.full_at.map_or(now, |at| at.max(now));
        self.full_at = Some(from + rate.period);
    }

    /// Takes a token if there is one, and returns whether there was.
    pub fn try_take(&mut self, rate: Rate, now: Instant) -> bool {
        let admitted = self.wait(rate, now).is_zero();
        if admitted {
            self.take(rate, now);
        }
        admitted
    }

    /// Whether the bucket is full, as if never used.
    #[must_use]
    pub fn is_full(&self, now: Instant) -> bool {
        self.full_at.is_none_or(|at| at <= now)
    }
}

// === impl SharedBucket ===

impl SharedBucket {
    /// As [`Bucket::try_take`].
    pub fn try_take(&self, rate: Rate, now: Instant) -> bool {
        let (now, period) = (self.nanos(now), nanos(rate.period));
        let most = now.saturating_add(period.saturating_mul(u64::from(rate.burst)));
        let take =
            |full_at: u64| Some(full_at.max(now) + period).filter(|full_at| *full_at <= most);
        self.full_at.fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// As [`Bucket::is_full`].
    #[must_use]
    pub fn is_full(&self, now: Instant) -> bool {
        self.full_at.load(Relaxed) <= self.nanos(now)
    }

    fn nanos(&self, now: Instant) -> u64 {
        nanos(now.saturating_duration_since(self.began))
    }
}

impl Default for SharedBucket {
    fn default() -> Self {
        Self { began: Instant::now(), full_at: AtomicU64::new(0) }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_bucket_gives_its_burst_and_then_one_a_period() {
        let rate = Rate { burst: 3, period: SECOND };
        let (mut bucket, now) = (Bucket::default(), Instant::now());
        for _ in 0..3 {
            assert_eq!(bucket.wait(rate, now), Duration::ZERO);
            bucket.take(rate, now);
        }
        assert_eq!(bucket.wait(rate, now), SECOND);
        assert_eq!(bucket.wait(rate, now + SECOND / 4), SECOND * 3 / 4);
        assert_eq!(bucket.wait(rate, now + SECOND), Duration::ZERO);
        bucket.take(rate, now + SECOND);
        assert_eq!(bucket.wait(rate, now + SECOND), SECOND);
        // However long nobody asks, no more than the burst is saved up.
        let later = now + SECOND * 1000;
        (0..3).for_each(|_| bucket.take(rate, later));
        assert_eq!(bucket.wait(rate, later), SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shared_bucket_gives_what_a_bucket_gives() {
        for rate in [Rate { burst: 3, period: SECOND }, Rate::per_second(1_000_000, 1)] {
            let (shared, mut one) = (SharedBucket::default(), Bucket::default());
            for step in 0..10_000_u32 {
                let now = Instant::now();
                assert_eq!(shared.is_full(now), one.is_full(now), "{rate:?}, step {step}");
                let took = (shared.try_take(rate, now), one.try_take(rate, now));
                assert_eq!(took.0, took.1, "{rate:?}, step {step}");
                tokio::time::advance(rate.period * (step * 7 % 13) / 5).await;
            }
        }
    }

    #[test]
    fn threads_get_the_burst_together() {
        let (bucket, now) = (SharedBucket::default(), Instant::now());
        let rate = Rate { burst: 1000, period: SECOND };
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..1000).filter(|_| bucket.try_take(rate, now)).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 1000);
    }
}

//! One owner's share of the agent's work: its rate of requests, and its turn.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::ready,
    time::Duration,
};

use tokio::{sync::Semaphore, task::yield_now, time::Instant};
use tokio_util::sync::PollSemaphore;

/// Concurrently running connections of one owner. Others wait for the owner's turn outside the runtime's queue, so that
/// this queue has one task for each owner, however many connections an owner has.
const TURNS: usize = 1;

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// In the long run.
    pub per_second: u32,
    /// At once, after a time without any.
    pub burst: u32,
}

/// What is left of a [`Rate`]: a token bucket, kept as the time at which it is full again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    rate: Rate,
    full_at: Instant,
}

/// The share of one owner.
#[derive(Debug)]
pub(super) struct Share {
    requests: Mutex<Bucket>,
    turns: Arc<Semaphore>,
}

/// Whether a connection has used its turn.
#[derive(Debug, Default)]
pub(super) struct Turn {
    answered: AtomicBool,
}

// === impl Rate ===

impl Rate {
    /// Of one pod, unless the operator says otherwise: a busy pod's SDKs ask a few times an hour, and a client that makes a new
    /// session for each call makes three requests for it.
    pub const POD: Self = Self { per_second: 200, burst: 1000 };

    fn period(self) -> Duration {
        Duration::from_secs(1) / self.per_second.max(1)
    }
}

// === impl Bucket ===

impl Bucket {
    pub(super) fn full(rate: Rate, now: Instant) -> Self {
        Self { rate, full_at: now }
    }

    /// Takes one; `false` when there is none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let admitted = self.wait(now).is_zero();
        if admitted {
            self.full_at = self.full_at.max(now) + self.rate.period();
        }
        admitted
    }

    /// How long until there is one to take.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        let missing = self.full_at.saturating_duration_since(now) + self.rate.period();
        missing.saturating_sub(self.rate.period() * self.rate.burst.max(1))
    }

    /// Whether it is as good as a new one.
    pub(super) fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }
}

// === impl Share ===

impl Share {
    pub(super) fn new(requests: Rate, now: Instant) -> Self {
        let requests = Mutex::new(Bucket::full(requests, now));
        Self { requests, turns: Arc::new(Semaphore::new(TURNS)) }
    }

    /// Whether the owner may make another request now.
    pub(super) fn admits(&self) -> bool {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
    }

    pub(super) fn is_unused(&self, now: Instant) -> bool {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).is_full(now)
    }

    /// Runs `work`, which is one connection's, in the owner's turns. A turn ends where the work has to wait, and at
    /// [`Turn::next`], so that a waiting request delays no others.
    pub(super) async fn in_turns<T>(&self, turn: &Turn, work: impl Future<Output = T>) -> T {
        let mut turns = PollSemaphore::new(self.turns.clone());
        let mut work = pin!(work);
        poll_fn(|context| {
            // Never closed.
            let permit = ready!(turns.poll_acquire(context));
            turn.answered.store(false, Ordering::Relaxed);
            let polled = work.as_mut().poll(context);
            drop(permit);
            polled
        })
        .await
    }
}

// === impl Turn ===

impl Turn {
    /// Waits until the connection may answer: not at all for the first request of a turn. Each further pipelined request
    /// waits for the next turn, and for other tasks that are ready to run.
    pub(super) async fn next(&self) {
        while self.answered.swap(true, Ordering::Relaxed) {
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::{join, sync::Notify};

    use super::*;

    const RATE: Rate = Rate { per_second: 200, burst: 1000 };

    #[test]
    fn a_bucket_gives_a_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::full(RATE, start);
        let taken = |bucket: &mut Bucket, now| (0..5000).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 1000);
        assert_eq!(bucket.wait(start), Duration::from_millis(5));
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(4)), 0);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(1)), 200);
        assert!(!bucket.is_full(start + Duration::from_secs(5)));
        let later = start + Duration::from_secs(6);
        assert!(bucket.is_full(later));
        assert_eq!(taken(&mut bucket, later), 1000, "what was not used is not saved up");
    }

    #[tokio::test]
    async fn connections_of_one_owner_take_turns_and_one_that_waits_has_none() {
        let share = Share::new(RATE, Instant::now());
        let released = Notify::new();
        let (held, other) = (Turn::default(), Turn::default());
        let waits = share.in_turns(&held, released.notified());
        let goes_on = share.in_turns(&other, async { released.notify_one() });
        join!(waits, goes_on);
    }

    #[tokio::test]
    async fn who_has_many_requests_answers_one_each_time_it_is_polled() {
        let share = Share::new(RATE, Instant::now());
        let (turn, answers) = (Turn::default(), AtomicUsize::new(0));
        let greedy = share.in_turns(&turn, async {
            for _ in 0..100 {
                turn.next().await;
                answers.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut greedy = pin!(greedy);
        for round in 1..=100 {
            let polled = futures::poll!(greedy.as_mut());
            assert_eq!((answers.load(Ordering::Relaxed), polled.is_ready()), (round, round == 100));
        }
    }
}

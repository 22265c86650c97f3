//! One owner's share of the agent's work: its rate of requests, and its lanes.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::{task::yield_now, time::Instant};

use super::lanes::Lanes;
use kiam_core::rate::{Rate, SharedBucket};

/// The share of one owner.
pub(super) struct Share {
    rate: Rate,
    requests: SharedBucket,
    lanes: Lanes,
}

/// Keeps a client that sends many requests at once to one answer each time that its connection is polled.
#[derive(Debug, Default)]
pub(super) struct Pipeline {
    answered: AtomicBool,
}

// === impl Share ===

impl Share {
    pub(super) fn new(rate: Rate, lanes: usize) -> Self {
        Self { rate, requests: SharedBucket::default(), lanes: Lanes::new(lanes) }
    }

    /// Whether the owner may make another request now.
    pub(super) fn admits(&self, now: Instant) -> bool {
        self.requests.try_take(self.rate, now)
    }

    pub(super) fn is_unused(&self, now: Instant) -> bool {
        self.requests.is_full(now)
    }

    pub(super) fn lanes(&self) -> &Lanes {
        &self.lanes
    }
}

// === impl Pipeline ===

impl Pipeline {
    /// The connection is polled now.
    pub(super) fn polled(&self) {
        self.answered.store(false, Ordering::Relaxed);
    }

    /// Waits until the connection may answer: not at all for the first request of a poll. Each further one waits for the
    /// next, and for other tasks that are ready to run.
    pub(super) async fn next(&self) {
        while self.answered.swap(true, Ordering::Relaxed) {
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, sync::atomic::AtomicUsize};

    use super::*;

    #[tokio::test]
    async fn who_has_many_requests_answers_one_each_time_it_is_polled() {
        let (pipeline, answers) = (Pipeline::default(), AtomicUsize::new(0));
        let mut greedy = pin!(async {
            for _ in 0..100 {
                pipeline.next().await;
                answers.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut greedy = poll_fn(|context| {
            pipeline.polled();
            greedy.as_mut().poll(context)
        });
        for round in 1..=100 {
            let polled = futures::poll!(&mut greedy);
            assert_eq!((answers.load(Ordering::Relaxed), polled.is_ready()), (round, round == 100));
        }
    }
}

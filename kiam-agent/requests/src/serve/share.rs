//! One owner's share of the agent's work: its rate of requests, and its turn.

use std::{
    future::poll_fn,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::ready,
};

use tokio::{task::yield_now, time::Instant};

use super::turns::Turns;
use kiam_core::rate::{Bucket, Rate};

/// The share of one owner.
#[derive(Debug)]
pub(super) struct Share {
    rate: Rate,
    requests: Mutex<Bucket>,
    /// One connection of the owner runs at a time. Others wait outside the runtime's queue, so that this queue has one task
    /// for each owner, however many connections an owner has.
    turns: Turns,
}

/// Whether a connection has used its turn.
#[derive(Debug, Default)]
pub(super) struct Turn {
    answered: AtomicBool,
}

// === impl Share ===

impl Share {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, requests: Mutex::default(), turns: Turns::default() }
    }

    /// Whether the owner may make another request now.
    pub(super) fn admits(&self) -> bool {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.try_take(self.rate, Instant::now())
    }

    pub(super) fn is_unused(&self, now: Instant) -> bool {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).is_full(now)
    }

    /// Runs `work`, which is one connection's, in the owner's turns. A turn ends where the work has to wait, and at
    /// [`Turn::next`], so that a waiting request delays no others.
    pub(super) async fn in_turns<T>(&self, turn: &Turn, work: impl Future<Output = T>) -> T {
        let mut place = self.turns.place();
        let mut work = pin!(work);
        poll_fn(|context| {
            let _turn = ready!(place.poll_take(context));
            turn.answered.store(false, Ordering::Relaxed);
            work.as_mut().poll(context)
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

    use super::{super::POD_RATE, *};

    #[tokio::test]
    async fn connections_of_one_owner_take_turns_and_one_that_waits_has_none() {
        let share = Share::new(POD_RATE);
        let released = Notify::new();
        let (held, other) = (Turn::default(), Turn::default());
        let waits = share.in_turns(&held, released.notified());
        let goes_on = share.in_turns(&other, async { released.notify_one() });
        join!(waits, goes_on);
    }

    #[tokio::test]
    async fn who_has_many_requests_answers_one_each_time_it_is_polled() {
        let share = Share::new(POD_RATE);
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

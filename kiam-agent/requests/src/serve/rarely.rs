//! A future beside a busy one, which costs nothing while it sleeps.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures::task::AtomicWaker;

/// A future that is polled when it was woken itself, and not whenever its task runs. Polling a timer or a watched value
/// takes a lock that all connections share.
pub(super) struct Rarely<'a, F> {
    future: Pin<&'a mut F>,
    wakeup: Arc<Wakeup>,
    own_waker: Waker,
}

#[derive(Default)]
struct Wakeup {
    woken: AtomicBool,
    task: AtomicWaker,
}

// === impl Wakeup ===

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

// === impl Rarely ===

impl<'a, F: Future> Rarely<'a, F> {
    pub(super) fn new(future: Pin<&'a mut F>) -> Self {
        let wakeup = Arc::new(Wakeup { woken: AtomicBool::new(true), task: AtomicWaker::new() });
        let own_waker = Waker::from(wakeup.clone());
        Self { future, wakeup, own_waker }
    }

    /// Polls the future if it was woken since the last time. It must not be polled again once it was ready.
    pub(super) fn poll(&mut self, context: &Context<'_>) -> Poll<F::Output> {
        // Before the flag is read, so that whoever sets it then wakes the task. Each time, since waking takes the waker, and may
        // take it after the flag that it set was read.
        self.wakeup.task.register(context.waker());
        if !self.wakeup.woken.load(Ordering::Relaxed)
            || !self.wakeup.woken.swap(false, Ordering::Acquire)
        {
            return Poll::Pending;
        }
        self.future.as_mut().poll(&mut Context::from_waker(&self.own_waker))
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, sync::atomic::AtomicUsize, time::Duration};

    use tokio::time::{Instant, advance, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_sleeping_future_is_left_alone_and_wakes_its_task_each_time() {
        let polls = AtomicUsize::new(0);
        let mut sleeping = pin!(async {
            for _ in 0..3 {
                let mut sleeping = pin!(sleep(Duration::from_secs(1)));
                poll_fn(|context| {
                    polls.fetch_add(1, Ordering::Relaxed);
                    sleeping.as_mut().poll(context)
                })
                .await;
            }
        });
        let mut rarely = Rarely::new(sleeping.as_mut());
        let begun = Instant::now();
        for _ in 0..100 {
            advance(Duration::from_millis(1)).await;
            let polled = poll_fn(|context| Poll::Ready(rarely.poll(context))).await;
            assert!(polled.is_pending());
        }
        assert_eq!(polls.load(Ordering::Relaxed), 1);
        poll_fn(|context| rarely.poll(context)).await;
        // Two for each sleep.
        assert_eq!((polls.load(Ordering::Relaxed), begun.elapsed().as_secs()), (6, 3));
    }

    #[tokio::test]
    async fn a_task_that_moves_to_another_waker_is_woken_there() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let mut receiver = pin!(receiver);
        let mut rarely = Rarely::new(receiver.as_mut());
        let (old, new) = (Arc::<Wakeup>::default(), Arc::<Wakeup>::default());
        for waker in [&old, &new] {
            let waker = Waker::from(waker.clone());
            assert!(rarely.poll(&Context::from_waker(&waker)).is_pending());
        }
        sender.send(7).unwrap();
        let woken = |wakeup: &Wakeup| wakeup.woken.load(Ordering::Relaxed);
        assert!(!woken(&old) && woken(&new));
        assert_eq!(rarely.poll(&Context::from_waker(Waker::noop())), Poll::Ready(Ok(7)));
    }

    #[tokio::test]
    async fn a_wakeup_that_is_late_takes_no_later_one_with_it() {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let mut receiver = pin!(receiver);
        let mut rarely = Rarely::new(receiver.as_mut());
        let task = Arc::<Wakeup>::default();
        let waker = Waker::from(task.clone());
        let context = Context::from_waker(&waker);
        let woken = || task.woken.swap(false, Ordering::Relaxed);
        assert!(rarely.poll(&context).is_pending());
        // Another thread has set the flag, and wakes the task only once the task has seen that.
        rarely.wakeup.woken.store(true, Ordering::Release);
        assert!(rarely.poll(&context).is_pending());
        rarely.wakeup.task.wake();
        assert!(woken() && rarely.poll(&context).is_pending());
        sender.send(7).unwrap();
        assert!(woken());
        assert_eq!(rarely.poll(&context), Poll::Ready(Ok(7)));
    }
}

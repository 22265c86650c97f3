//! One turn, which the connections of an owner pass on in the order in which they asked for it.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// The owner's turn. A connection asks for it each time that it is polled, so this is a queue of wakers behind one lock,
/// and not a semaphore, whose waiters are futures.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    /// Whether somebody has the turn, or it was passed on to somebody who has not taken it yet.
    taken: bool,
    passed_to: Option<u64>,
    next: u64,
    waiting: VecDeque<(u64, Waker)>,
}

/// A connection's place in the queue. Dropped, it makes way for the next.
#[derive(Debug)]
pub(super) struct Place<'a> {
    turns: &'a Turns,
    number: Option<u64>,
}

/// The turn itself. Dropped, also by a panic, it is passed on.
#[derive(Debug)]
pub(super) struct TurnGuard<'a>(&'a Turns);

// === impl Turns ===

impl Turns {
    /// A place for a connection, which waits for nothing yet.
    pub(super) fn place(&self) -> Place<'_> {
        Place { turns: self, number: None }
    }

    fn pass_on(&self) {
        let mut queue = self.queue();
        let next = queue.waiting.pop_front();
        queue.taken = next.is_some();
        queue.passed_to = next.as_ref().map(|(number, _)| *number);
        drop(queue);
        if let Some((_, waker)) = next {
            waker.wake();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Place ===

impl<'a> Place<'a> {
    /// The turn, once it is this connection's.
    pub(super) fn poll_take(&mut self, context: &Context<'_>) -> Poll<TurnGuard<'a>> {
        let mut queue = self.turns.queue();
        match self.number {
            None if !queue.taken => queue.taken = true,
            None => {
                let number = queue.next;
                queue.next += 1;
                queue.waiting.push_back((number, context.waker().clone()));
                self.number = Some(number);
                return Poll::Pending;
            }
            Some(number) if queue.passed_to == Some(number) => {
                queue.passed_to = None;
                self.number = None;
            }
            Some(number) => {
                let own = queue.waiting.iter_mut().find(|(other, _)| *other == number);
                if let Some((_, waker)) = own {
                    waker.clone_from(context.waker());
                }
                return Poll::Pending;
            }
        }
        Poll::Ready(TurnGuard(self.turns))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let mut queue = self.turns.queue();
        if queue.passed_to == Some(number) {
            drop(queue);
            self.turns.pass_on();
        } else {
            queue.waiting.retain(|(other, _)| *other != number);
        }
    }
}

// === impl TurnGuard ===

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.0.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::Wake,
    };

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn counted() -> (Arc<Count>, Waker) {
        let count = Arc::<Count>::default();
        (count.clone(), Waker::from(count))
    }

    #[test]
    fn the_turn_is_passed_on_in_order_and_taken_by_nobody_else() {
        let turns = Turns::default();
        let mut places: Vec<_> = (0..3).map(|_| turns.place()).collect();
        let wakers: Vec<_> = (0..3).map(|_| counted()).collect();
        let mut poll = |n: usize| places[n].poll_take(&Context::from_waker(&wakers[n].1));
        let Poll::Ready(first) = poll(0) else { panic!("nobody has it") };
        assert!(poll(1).is_pending() && poll(2).is_pending() && poll(1).is_pending());
        drop(first);
        let woken = |n: usize| wakers[n].0.0.load(Ordering::Relaxed);
        assert_eq!([woken(0), woken(1), woken(2)], [0, 1, 0]);
        assert!(poll(0).is_pending() && poll(2).is_pending(), "it was passed on to another");
        let Poll::Ready(second) = poll(1) else { panic!("it was passed on to this one") };
        drop(second);
        assert_eq!([woken(0), woken(1), woken(2)], [0, 1, 1]);
        drop(poll(2));
        assert_eq!([woken(0), woken(1), woken(2)], [1, 1, 1]);
        drop(poll(0));
        let queue = turns.queue();
        assert!(!queue.taken && queue.passed_to.is_none() && queue.waiting.is_empty());
    }

    #[test]
    fn a_connection_that_ends_while_it_waits_keeps_nobody_else_waiting() {
        let turns = Turns::default();
        let (mut first, mut gone, mut also_gone) = (turns.place(), turns.place(), turns.place());
        let mut last = turns.place();
        let (count, waker) = counted();
        let context = Context::from_waker(&waker);
        let Poll::Ready(turn) = first.poll_take(&context) else { panic!("nobody has it") };
        for place in [&mut gone, &mut also_gone, &mut last] {
            assert!(place.poll_take(&context).is_pending());
        }
        drop(gone);
        drop(turn);
        // It was passed on to one that never takes it.
        drop(also_gone);
        assert_eq!(count.0.load(Ordering::Relaxed), 2);
        assert!(last.poll_take(&context).is_ready());
    }

    #[test]
    fn a_waiting_connection_is_woken_by_its_latest_waker() {
        let turns = Turns::default();
        let (mut first, mut second) = (turns.place(), turns.place());
        let ((old, old_waker), (new, new_waker)) = (counted(), counted());
        let Poll::Ready(turn) = first.poll_take(&Context::from_waker(&old_waker)) else {
            panic!("nobody has it")
        };
        for waker in [&old_waker, &new_waker] {
            assert!(second.poll_take(&Context::from_waker(waker)).is_pending());
        }
        drop(turn);
        let woken = |count: &Count| count.0.load(Ordering::Relaxed);
        assert_eq!((woken(&old), woken(&new)), (0, 1));
    }
}

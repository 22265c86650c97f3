//! The connections of one owner, driven by as many tasks as the runtime has workers.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use futures::{
    StreamExt as _,
    future::{BoxFuture, poll_fn},
    stream::FuturesUnordered,
};
use tokio::time::Instant;

/// How long a lane's turn is. A connection that is ready takes about ten microseconds of it.
const TURN: Duration = Duration::from_micros(15);

/// The lanes of one owner. However many connections it has, and however much they ask at once, the runtime's queue has one
/// task for each lane, and the next owner waits for one turn of it.
pub(super) struct Lanes {
    /// As many as connections have been open at once, up to `most`.
    lanes: Mutex<Vec<Arc<Lane>>>,
    most: usize,
}

/// The task of some connections. It ends with the last of them.
struct Lane {
    entrance: Mutex<Entrance>,
    /// The open connections.
    open: AtomicUsize,
    created: Instant,
    /// When the turn ends, in nanoseconds since `created`.
    turn_ends: AtomicU64,
    /// The connections that have been polled in this turn.
    polled: AtomicUsize,
}

#[derive(Default)]
struct Entrance {
    arrived: Vec<Connection>,
    task: Task,
}

/// The task behind an entrance.
#[derive(Default)]
enum Task {
    #[default]
    None,
    /// It was spawned, and looks at the entrance when it first runs.
    Spawned,
    Waiting(Waker),
}

/// A connection in its lane.
struct Connection {
    work: BoxFuture<'static, ()>,
    lane: Arc<Lane>,
}

// === impl Lanes ===

impl Lanes {
    /// At most `most` lanes, and at least one.
    pub(super) fn new(most: usize) -> Self {
        Self { lanes: Mutex::default(), most: most.max(1) }
    }

    /// Drives `work`, which is one connection's, to its end.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.emptiest().add(Box::pin(work));
    }

    /// The lane with the fewest connections, or a new one where each has some.
    fn emptiest(&self) -> Arc<Lane> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let emptiest = lanes.iter().min_by_key(|lane| lane.open.load(Ordering::Relaxed));
        match emptiest {
            Some(lane) if lanes.len() >= self.most || lane.open.load(Ordering::Relaxed) == 0 => {
                lane.clone()
            }
            _ => {
                let lane = Arc::new(Lane::new());
                lanes.push(lane.clone());
                lane
            }
        }
    }
}

// === impl Lane ===

impl Lane {
    fn new() -> Self {
        Self {
            entrance: Mutex::default(),
            open: AtomicUsize::new(0),
            created: Instant::now(),
            turn_ends: AtomicU64::new(0),
            polled: AtomicUsize::new(0),
        }
    }

    fn add(self: &Arc<Self>, work: BoxFuture<'static, ()>) {
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut entrance = self.entrance();
        entrance.arrived.push(Connection { work, lane: self.clone() });
        match &entrance.task {
            Task::Waiting(waker) => waker.wake_by_ref(),
            Task::Spawned => {}
            Task::None => {
                entrance.task = Task::Spawned;
                tokio::spawn(self.clone().drive());
            }
        }
    }

    async fn drive(self: Arc<Self>) {
        let mut open = FuturesUnordered::new();
        poll_fn(|context| self.poll_turn(&mut open, context)).await;
    }

    /// One turn. The task is woken again if it ends while connections are ready.
    fn poll_turn(
        &self,
        open: &mut FuturesUnordered<Connection>,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        self.polled.store(0, Ordering::Relaxed);
        self.turn_ends.store(self.elapsed().saturating_add(nanos(TURN)), Ordering::Relaxed);
        loop {
            if self.enter(open, context.waker()) {
                return Poll::Ready(());
            }
            while ready!(open.poll_next_unpin(context)).is_some() {}
        }
    }

    /// Lets arrived connections in, and says whether the task ends, as there are none.
    fn enter(&self, open: &mut FuturesUnordered<Connection>, waker: &Waker) -> bool {
        let mut entrance = self.entrance();
        open.extend(entrance.arrived.drain(..));
        if open.is_empty() {
            *entrance = Entrance::default();
            return true;
        }
        match &mut entrance.task {
            Task::Waiting(known) => known.clone_from(waker),
            task => *task = Task::Waiting(waker.clone()),
        }
        false
    }

    fn elapsed(&self) -> u64 {
        nanos(self.created.elapsed())
    }

    /// Whether no other connection is polled in this turn. Never before the first, and the clock is read before each second.
    fn is_turn_over(&self) -> bool {
        let polled = self.polled.fetch_add(1, Ordering::Relaxed);
        polled % 2 == 1 && self.elapsed() >= self.turn_ends.load(Ordering::Relaxed)
    }

    fn entrance(&self) -> MutexGuard<'_, Entrance> {
        self.entrance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

// === impl Connection ===

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.lane.is_turn_over() {
            // The set of connections returns when two of them have woken themselves, and goes on with the next turn.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.work.as_mut().poll(context)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.lane.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use tokio::{sync::oneshot, task::yield_now};

    use super::*;

    /// What counts its polls, each of which takes as long as a turn, and is ready again at once until `stop`.
    fn greedy(polls: Arc<AtomicUsize>, stop: Arc<AtomicBool>) -> impl Future<Output = ()> {
        poll_fn(move |context| {
            polls.fetch_add(1, Ordering::Relaxed);
            let begun = Instant::now();
            while begun.elapsed() < TURN {}
            if stop.load(Ordering::Relaxed) {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    #[tokio::test]
    async fn another_task_waits_for_one_turn_of_each_lane_and_not_for_each_connection() {
        let (lanes, stop) = (Lanes::new(2), Arc::<AtomicBool>::default());
        let polls: Vec<_> = (0..50).map(|_| Arc::<AtomicUsize>::default()).collect();
        for own in &polls {
            lanes.spawn(greedy(own.clone(), stop.clone()));
        }
        let counts = polls.clone();
        let sum = move || counts.iter().map(|own| own.load(Ordering::Relaxed)).sum::<usize>();
        // In a task, since the runtime runs the test's own future rarely.
        let other = tokio::spawn(async move {
            let (rounds, mut most) = (2000, 0);
            for _ in 0..rounds {
                let before = sum();
                let (sender, receiver) = oneshot::channel();
                tokio::spawn(async move { sender.send(()) });
                receiver.await.unwrap();
                most = most.max(sum() - before);
            }
            println!("{} polls in {rounds} rounds, {most} in one", sum());
            assert!(sum() > rounds && most <= 8, "{most}");
        });
        other.await.unwrap();
        let each = polls.iter().map(|own| own.load(Ordering::Relaxed));
        let (least, most) = (each.clone().min().unwrap(), each.max().unwrap());
        assert!(most <= least + 3, "each connection comes around: {least} to {most}");
        stop.store(true, Ordering::Relaxed);
    }

    #[tokio::test]
    async fn a_lane_ends_with_its_last_connection_and_begins_again_with_the_next() {
        let lanes = Lanes::new(1);
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        for _ in 0..3 {
            let (first, wait) = oneshot::channel::<()>();
            lanes.spawn(async { drop(wait.await) });
            yield_now().await;
            let (ended, later) = oneshot::channel();
            lanes.spawn(async move { ended.send(()).unwrap() });
            later.await.unwrap();
            assert_eq!(tasks(), 1, "one connection is open");
            first.send(()).unwrap();
            while tasks() > 0 {
                yield_now().await;
            }
            assert!(matches!(lanes.lanes.lock().unwrap()[0].entrance().task, Task::None));
        }
    }

    #[tokio::test]
    async fn connections_are_spread_and_one_after_the_other_needs_one_lane() {
        let lanes = Lanes::new(4);
        let open = || {
            let lanes = lanes.lanes.lock().unwrap();
            lanes.iter().map(|lane| lane.open.load(Ordering::Relaxed)).collect::<Vec<_>>()
        };
        for _ in 0..10 {
            let (sender, receiver) = oneshot::channel();
            lanes.spawn(async move { sender.send(()).unwrap() });
            receiver.await.unwrap();
            yield_now().await;
            assert_eq!(open(), [0]);
        }
        let stops: Vec<_> = (0..10)
            .map(|_| {
                let (stop, stopped) = oneshot::channel::<()>();
                lanes.spawn(async { drop(stopped.await) });
                stop
            })
            .collect();
        assert_eq!(open(), [3, 3, 2, 2]);
        drop(stops);
        while open() != [0; 4] {
            yield_now().await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn none_is_lost_where_lanes_end_while_connections_come() {
        let lanes = Lanes::new(2);
        for _ in 0..20_000 {
            let (sender, receiver) = oneshot::channel();
            lanes.spawn(async move { sender.send(()).unwrap() });
            receiver.await.unwrap();
        }
    }
}

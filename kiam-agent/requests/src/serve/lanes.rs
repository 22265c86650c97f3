//! The connections of one owner, driven by a few tasks.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
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
    /// Whether this turn is over, and whether a connection that had to wait for it has been polled since.
    over: AtomicBool,
    overrun: AtomicBool,
}

/// A running task. Should it panic, its lane's next connection gets a new one, and those that wait end.
struct Driven(Option<Arc<Lane>>);

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
    /// Whether it was ready when a turn was over.
    has_waited: bool,
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
            over: AtomicBool::new(false),
            overrun: AtomicBool::new(false),
        }
    }

    fn add(self: &Arc<Self>, work: BoxFuture<'static, ()>) {
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut entrance = self.entrance();
        entrance.arrived.push(Connection { work, lane: self.clone(), has_waited: false });
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
        let mut driven = Driven(Some(self.clone()));
        let mut open = FuturesUnordered::new();
        poll_fn(|context| self.poll_turn(&mut open, context)).await;
        driven.0 = None;
    }

    /// One turn. The task is woken again if it ends while connections are ready.
    fn poll_turn(
        &self,
        open: &mut FuturesUnordered<Connection>,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        self.polled.store(0, Ordering::Relaxed);
        self.over.store(false, Ordering::Relaxed);
        self.overrun.store(false, Ordering::Relaxed);
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

    /// Whether a connection may be polled in this turn. The first may, and one that waited for another turn; once it is over,
    /// no other. The clock is read before each second one.
    fn admits(&self, has_waited: bool) -> bool {
        let polled = self.polled.fetch_add(1, Ordering::Relaxed);
        let over = self.over.load(Ordering::Relaxed)
            || polled % 2 == 1 && self.elapsed() >= self.turn_ends.load(Ordering::Relaxed);
        self.over.store(over, Ordering::Relaxed);
        !over || has_waited && !self.overrun.swap(true, Ordering::Relaxed)
    }

    fn entrance(&self) -> MutexGuard<'_, Entrance> {
        self.entrance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

// === impl Driven ===

impl Drop for Driven {
    fn drop(&mut self) {
        if let Some(lane) = self.0.take() {
            let left = std::mem::take(&mut *lane.entrance());
            drop(left);
        }
    }
}

// === impl Connection ===

impl Future for Connection {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if !self.lane.admits(self.has_waited) {
            // The set of connections returns when two of them have woken themselves, and goes on with the next turn.
            self.has_waited = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.has_waited = false;
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

    /// The most polls of `lanes` between two steps of another task, in as many rounds.
    fn most_between(
        sum: impl Fn() -> usize + Send + 'static,
        rounds: usize,
    ) -> tokio::task::JoinHandle<usize> {
        // In a task, since the runtime runs the test's own future rarely.
        tokio::spawn(async move {
            let mut most = 0;
            for _ in 0..rounds {
                let before = sum();
                let (sender, receiver) = oneshot::channel();
                tokio::spawn(async move { sender.send(()) });
                receiver.await.unwrap();
                most = most.max(sum() - before);
            }
            most
        })
    }

    #[tokio::test]
    async fn another_task_waits_for_one_turn_of_each_lane_and_not_for_each_connection() {
        for count in [48, 50] {
            let (lanes, stop) = (Lanes::new(2), Arc::<AtomicBool>::default());
            let polls: Vec<_> = (0..count).map(|_| Arc::<AtomicUsize>::default()).collect();
            for own in &polls {
                lanes.spawn(greedy(own.clone(), stop.clone()));
            }
            let counts = polls.clone();
            let sum = move || counts.iter().map(|own| own.load(Ordering::Relaxed)).sum::<usize>();
            let most = most_between(sum, 2000).await.unwrap();
            let each = polls.iter().map(|own| own.load(Ordering::Relaxed));
            let (least, greatest) = (each.clone().min().unwrap(), each.max().unwrap());
            println!("{count}: {most} in one round, {least} to {greatest} of each");
            // Two turns of each of two lanes, of two polls.
            assert!(most <= 8, "{most}");
            assert!(least > 50 && greatest <= least * 3, "{least} to {greatest} of each");
            stop.store(true, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_turn_ends_also_where_connections_end() {
        let (lanes, done) = (Lanes::new(2), Arc::<AtomicUsize>::default());
        // Before the lanes begin: they would be empty by its first step.
        let sum = done.clone();
        let most = most_between(move || sum.load(Ordering::Relaxed), 500);
        for _ in 0..400 {
            let done = done.clone();
            lanes.spawn(async move {
                let begun = Instant::now();
                while begun.elapsed() < TURN {}
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        let most = most.await.unwrap();
        println!("{most} in one round");
        assert!(most <= 8 && done.load(Ordering::Relaxed) == 400, "{most}, {done:?}");
    }

    #[tokio::test]
    async fn a_panic_ends_its_lanes_connections_and_not_those_that_come() {
        let lanes = Lanes::new(1);
        let (kept, ended) = oneshot::channel::<()>();
        lanes.spawn(async move {
            let _kept = kept;
            std::future::pending().await
        });
        lanes.spawn(async { panic!("as the test asks for") });
        assert!(ended.await.is_err());
        let (sender, receiver) = oneshot::channel();
        lanes.spawn(async move { sender.send(()).unwrap() });
        receiver.await.unwrap();
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

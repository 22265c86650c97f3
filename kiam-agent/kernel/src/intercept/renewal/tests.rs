//! The lease against a runtime that has no time for it.

use std::sync::{Mutex, atomic::AtomicBool};

use kiam_common::names::map;
use tokio::runtime::{Builder, Runtime};

use super::*;
use kiam_core::lifecycle::{DrainSignal, Readiness, drain};

const LIMIT: Duration = Duration::from_secs(30);

/// When it was renewed, and whether it has ended.
#[derive(Clone, Default)]
struct Fake(Arc<Written>);

#[derive(Default)]
struct Written {
    renewed: Mutex<Vec<Instant>>,
    ended: AtomicBool,
    fails: AtomicBool,
}

impl Renew for Fake {
    fn renew(&mut self) -> Result<(), Error> {
        if self.0.fails.load(Ordering::Relaxed) {
            return Err(Error::Missing(map::LEASE));
        }
        self.0.renewed.lock().unwrap().push(Instant::now());
        Ok(())
    }

    fn end(&mut self) -> Result<(), Error> {
        self.0.ended.store(true, Ordering::Relaxed);
        Ok(())
    }
}

struct Fixture {
    lease: Fake,
    readiness: Readiness,
    missed: Counter,
    drain: DrainSignal,
    task: tokio::task::JoinHandle<()>,
    runtime: Runtime,
}

impl Fixture {
    fn start(hung: Duration) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (lease, readiness, missed) =
            (Fake::default(), Readiness::default(), Counter::default());
        let (signal, draining) = drain();
        let renewal = Renewal {
            lease: lease.clone(),
            heartbeat: Arc::new(Heartbeat::now()),
            beat: Duration::from_millis(500),
            hung,
            attached: readiness.latch("attached"),
            missed: missed.clone(),
            renewed: None,
        };
        let task = runtime.spawn(renewal.spawn(draining).unwrap());
        let fixture = Self { lease, readiness, missed, drain: signal, task, runtime };
        fixture.eventually("renewed", || fixture.renewals() > 0 && fixture.readiness.is_ready());
        fixture
    }

    fn renewals(&self) -> usize {
        self.lease.0.renewed.lock().unwrap().len()
    }

    /// Keeps every thread of the runtime from running anything else until `until`.
    fn block(&self, until: Instant) {
        for _ in 0..2 {
            self.runtime.spawn(async move {
                while Instant::now() < until {
                    thread::sleep(Duration::from_millis(10));
                }
            });
        }
    }

    fn eventually(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < LIMIT, "not {what}; pending {:?}", self.readiness.pending());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end of what was started, and says whether the lease has ended with it.
    fn ended(self) -> bool {
        self.runtime.block_on(self.task).unwrap();
        assert!(!self.readiness.is_ready());
        self.lease.0.ended.load(Ordering::Relaxed)
    }
}

#[test]
fn a_runtime_without_time_does_not_keep_the_lease_from_being_renewed() {
    let agent = Fixture::start(LIMIT);
    let blocked = Instant::now() + Duration::from_secs(9);
    agent.block(blocked);
    agent.eventually("over", || Instant::now() > blocked);
    let renewed = agent.lease.0.renewed.lock().unwrap().clone();
    let gaps = renewed.windows(2).map(|two| two[1] - two[0]);
    let (longest, count) = (gaps.max().unwrap(), renewed.len());
    assert!(longest < Duration::from_secs(4) && count >= 4, "{longest:?}, {count} renewals");
    assert!(agent.readiness.is_ready());
    agent.drain.start();
    assert!(agent.ended());
}

#[test]
fn a_runtime_that_hangs_for_long_loses_the_lease_until_it_goes_on() {
    let agent = Fixture::start(Duration::from_secs(2));
    let blocked = Instant::now() + Duration::from_secs(10);
    agent.block(blocked);
    agent.eventually("hung", || !agent.readiness.is_ready());
    assert!(agent.missed.get() > 0);
    let before = agent.renewals();
    agent.eventually("over", || Instant::now() > blocked);
    agent.eventually("renewed again", || agent.renewals() > before && agent.readiness.is_ready());
    let last = agent.lease.0.renewed.lock().unwrap()[before - 1];
    assert!(last < blocked - Duration::from_secs(1), "renewed while it hung");
    agent.drain.start();
    assert!(agent.ended());
}

#[test]
fn what_keeps_it_from_being_renewed_shows_and_is_over_when_it_is() {
    let agent = Fixture::start(LIMIT);
    agent.lease.0.fails.store(true, Ordering::Relaxed);
    agent.eventually("failed", || !agent.readiness.is_ready());
    assert!(agent.missed.get() > 0);
    agent.lease.0.fails.store(false, Ordering::Relaxed);
    agent.eventually("renewed again", || agent.readiness.is_ready());
    // Whoever goes on with it renews it.
    agent.drain.hand_over(true);
    assert!(!agent.ended());
}

#[test]
fn the_lease_ends_with_the_drain_and_is_left_to_run_out_where_the_runtime_is_gone() {
    let agent = Fixture::start(LIMIT);
    agent.drain.start();
    assert!(agent.ended());
    let agent = Fixture::start(LIMIT);
    let lease = agent.lease.0.clone();
    agent.runtime.shutdown_background();
    let began = Instant::now();
    // The thread's own one goes with it.
    while Arc::strong_count(&lease) > 2 {
        assert!(began.elapsed() < LIMIT, "the thread goes on");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(!lease.ended.load(Ordering::Relaxed));
}

#[test]
fn a_panic_of_the_thread_ends_this_part_of_the_agent() {
    struct Panics;
    impl Renew for Panics {
        fn renew(&mut self) -> Result<(), Error> {
            panic!("as the test asks for")
        }
        fn end(&mut self) -> Result<(), Error> {
            Err(Error::File {
                what: "never asked",
                path: "/".into(),
                source: io::ErrorKind::Other.into(),
            })
        }
    }
    let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
    let (_signal, draining) = drain();
    let mut registry = Registry::default();
    runtime.block_on(async {
        let attached = Readiness::default().latch("attached");
        tokio::spawn(start(Panics, attached, &mut registry, draining).unwrap()).await.unwrap();
    });
}

//! Renews the lease, on a thread of its own.
//!
//! The lease says that the process lives, and pods are denied without it. So its renewal waits for nothing that pods load: not
//! for the runtime that answers them, and by [`realtime`] priority not for the processor time that the agent's cgroup has.
//! The thread stops renewing when the runtime's heartbeat has stopped for long, which under the worst load is late by
//! seconds: a runtime that is deadlocked must not keep pods waiting for answers for ever.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{sync::oneshot, time::Instant};
use tracing::{error, info, warn};

use super::{Error, Lease};
use crate::realtime;
use kiam_core::{
    lifecycle::{Drain, Latch},
    ticks::ticks,
};

/// The time between two heartbeats of the runtime.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long the runtime may have had no heartbeat. Load delays it by less, and a deadlock does not end.
const HUNG: Duration = Duration::from_secs(30);

/// A lease that the thread renews; tests have another one.
trait Renew: Send + 'static {
    fn renew(&mut self) -> Result<(), Error>;
    fn end(&mut self) -> Result<(), Error>;
}

/// The order to end the lease. Without it, when its sender is gone, the lease is left to run out or to another agent.
struct End;

/// When the runtime was last heard from.
#[derive(Debug)]
struct Heartbeat {
    began: Instant,
    millis: AtomicU64,
}

/// What keeps the lease from being renewed.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Kernel(#[from] Error),
    #[error("the agent's runtime has run no task for {} s", .0.as_secs())]
    Hung(Duration),
}

/// What the thread works with.
struct Renewal<L> {
    lease: L,
    heartbeat: Arc<Heartbeat>,
    /// The time between two heartbeats.
    beat: Duration,
    hung: Duration,
    attached: Latch,
    missed: Counter,
    /// Whether it was renewed last time; `None` before the first.
    renewed: Option<bool>,
}

/// Renews `lease` from now on, as long as what is returned is polled; `attached` is set while that succeeds. When the drain
/// begins the lease ends, unless another agent goes on with it.
///
/// # Errors
///
/// The system gives no thread.
pub fn keep_renewed(
    lease: Lease,
    attached: Latch,
    registry: &mut Registry,
    drain: Drain,
) -> io::Result<impl Future<Output = ()> + use<>> {
    start(lease, attached, registry, drain)
}

fn start<L: Renew>(
    lease: L,
    attached: Latch,
    registry: &mut Registry,
    drain: Drain,
) -> io::Result<impl Future<Output = ()> + use<L>> {
    let missed = Counter::default();
    registry.register(
        "kiam_lease_missed",
        "Renewals of the lease that failed, or were left out as the agent's runtime hung",
        missed.clone(),
    );
    let heartbeat = Arc::new(Heartbeat::now());
    let renewal =
        Renewal { lease, heartbeat, beat: HEARTBEAT, hung: HUNG, attached, missed, renewed: None };
    renewal.spawn(drain)
}

// === impl Lease ===

impl Renew for Lease {
    fn renew(&mut self) -> Result<(), Error> {
        Self::renew(self)
    }

    fn end(&mut self) -> Result<(), Error> {
        Self::end(self)
    }
}

// === impl Heartbeat ===

impl Heartbeat {
    fn now() -> Self {
        Self { began: Instant::now(), millis: AtomicU64::new(0) }
    }

    fn beat(&self) {
        let millis = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.millis.store(millis, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        let last = Duration::from_millis(self.millis.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(last)
    }
}

// === impl Renewal ===

impl<L: Renew> Renewal<L> {
    /// Starts the thread. The future that is returned is the runtime's heartbeat, and ends with the thread.
    fn spawn(self, mut drain: Drain) -> io::Result<impl Future<Output = ()> + use<L>> {
        let (heartbeat, beat) = (self.heartbeat.clone(), self.beat);
        let (end, ends) = mpsc::channel();
        let (running, mut ended) = oneshot::channel::<()>();
        thread::Builder::new().name("lease".to_owned()).spawn(move || {
            if let Err(error) = realtime::enter() {
                warn!(%error, "SCHED_FIFO is not allowed, so the lease may run out on a node without CPU time for the agent");
            }
            self.run(&ends);
            drop(running);
        })?;
        Ok(async move {
            let mut beats = ticks(beat);
            loop {
                tokio::select! {
                    _ = beats.tick() => heartbeat.beat(),
                    () = drain.started() => break,
                    // The thread panicked, which was logged. This part of the agent ends, and so does the agent.
                    _ = &mut ended => return,
                }
            }
            if !drain.is_handed_over() {
                // Not received only where the thread has panicked.
                let _ = end.send(End);
            }
            drop(end);
            let _ = ended.await;
        })
    }

    fn run(mut self, ends: &mpsc::Receiver<End>) {
        loop {
            self.renew();
            match ends.recv_timeout(Lease::RENEWAL) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.attached.clear(),
                Ok(End) => break,
            }
        }
        self.attached.clear();
        if let Err(failure) = self.lease.end() {
            error!(error = %failure, "Lease not ended; it expires within 10 s");
        }
    }

    /// Locks and logs only when something has changed: whoever holds such a lock may be waiting for the processor.
    fn renew(&mut self) {
        let silence = self.heartbeat.silence();
        let renewed = match silence > self.hung {
            true => Err(Trouble::Hung(silence)),
            false => self.lease.renew().map_err(Trouble::from),
        };
        let before = self.renewed.replace(renewed.is_ok());
        match renewed {
            Ok(()) if before == Some(true) => {}
            Ok(()) => {
                self.attached.set();
                if before == Some(false) {
                    info!("Lease renewed again");
                }
            }
            Err(trouble) => {
                self.missed.inc();
                if before != Some(false) {
                    self.attached.clear();
                    error!(error = %trouble, "Lease not renewed: the kernel denies pods' IMDS traffic");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Ready, draining, stopping.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::sync::watch;

/// What must hold before the agent calls itself ready: a named [`Latch`] for each.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, bool>>>);

/// One condition of [`Readiness`]; pending until [`Latch::set`].
#[derive(Clone, Debug)]
pub struct Latch {
    name: &'static str,
    readiness: Readiness,
}

/// Tells every part to finish what it has begun and take nothing new.
#[derive(Debug)]
pub struct DrainSignal(watch::Sender<Phase>);

/// The parts' end of a [`DrainSignal`].
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<Phase>);

/// What the parts are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Another process goes on with the work; `queue`: it accepts from the same sockets.
    HandedOver {
        queue: bool,
    },
    /// Nobody does.
    Ending,
}

/// A connected pair: the signal for the owner, the other for the parts (clone it).
#[must_use]
pub fn drain() -> (DrainSignal, Drain) {
    let (tx, rx) = watch::channel(Phase::Running);
    (DrainSignal(tx), Drain(rx))
}

// === impl Readiness ===

impl Readiness {
    /// Adds a condition, pending until it is set.
    #[must_use]
    pub fn latch(&self, name: &'static str) -> Latch {
        self.record(name, false);
        Latch { name, readiness: self.clone() }
    }

    /// The conditions that do not hold now, by name.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        let latches = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        latches.iter().filter(|(_, set)| !**set).map(|(name, _)| *name).collect()
    }

    /// Whether every condition holds.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pending().is_empty()
    }

    fn record(&self, name: &'static str, set: bool) {
        let mut latches = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        latches.insert(name, set);
    }
}

// === impl Latch ===

impl Latch {
    /// The condition holds.
    pub fn set(&self) {
        self.readiness.record(self.name, true);
    }

    /// The condition holds no longer.
    pub fn clear(&self) {
        self.readiness.record(self.name, false);
    }
}

// === impl DrainSignal ===

impl DrainSignal {
    /// Begins the drain; saying it twice, or after [`DrainSignal::hand_over`], changes nothing.
    pub fn start(&self) {
        self.begin(Phase::Ending);
    }

    /// Begins the drain of a process whose work another one goes on with; `queue`: it accepts from the same
    /// sockets, so that whoever connects now is its.
    pub fn hand_over(&self, queue: bool) {
        self.begin(Phase::HandedOver { queue });
    }

    fn begin(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let running = *now == Phase::Running;
            if running {
                *now = phase;
            }
            running
        });
    }
}

// === impl Drain ===

impl Drain {
    /// Returns once the drain has begun, or its signal is gone.
    pub async fn started(&mut self) {
        // An error means that the signal was dropped: the process is going down.
        let _ = self.0.wait_for(|phase| *phase != Phase::Running).await;
    }

    /// Whether the drain has begun.
    #[must_use]
    pub fn is_started(&self) -> bool {
        *self.0.borrow() != Phase::Running
    }

    /// Whether it has begun because another process goes on with the work.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        matches!(*self.0.borrow(), Phase::HandedOver { .. })
    }

    /// Whether that one accepts from the same sockets.
    #[must_use]
    pub fn is_queue_handed_over(&self) -> bool {
        *self.0.borrow() == Phase::HandedOver { queue: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_once_every_latch_is_set_and_not_after_one_is_cleared() {
        let readiness = Readiness::default();
        let pods = readiness.latch("pods synced");
        let hook = readiness.latch("hook attached");
        assert_eq!(readiness.pending(), ["hook attached", "pods synced"]);
        pods.set();
        assert_eq!(readiness.pending(), ["hook attached"]);
        hook.set();
        assert!(readiness.is_ready());
        hook.clear();
        assert_eq!(readiness.pending(), ["hook attached"]);
    }

    #[tokio::test]
    async fn drain_reaches_every_clone_even_late() {
        let (signal, drain) = drain();
        let mut early = drain.clone();
        let waiting = tokio::spawn(async move { early.started().await });
        assert!(!drain.is_started());
        signal.start();
        waiting.await.unwrap();
        drain.clone().started().await;
        assert!(drain.is_started() && !drain.is_handed_over());
        signal.hand_over(true);
        assert!(!drain.is_handed_over(), "the end can't be handed over any more");
    }
}

//! The states of the process: ready, draining, stopping. Runs what the agent can do without.

use std::{
    borrow::Cow, collections::BTreeMap, future::pending, panic::AssertUnwindSafe, sync::Arc,
};

use futures::FutureExt as _;
use tokio::sync::watch;
use tracing::error;

/// The condition that an agent adds when it is asked to end. It holds never again, and `uninstall` reads it.
pub const ENDING: &str = "asked to end: serving until another agent takes over";

/// The conditions under which the agent is ready: a named [`Latch`] for each.
#[derive(Clone, Debug)]
pub struct Readiness(Arc<watch::Sender<State>>);

#[derive(Debug, Default)]
struct State {
    latches: BTreeMap<&'static str, bool>,
    details: BTreeMap<&'static str, Cow<'static, str>>,
}

/// A fact for operators that readiness does not depend on.
#[derive(Clone, Debug)]
pub struct Detail {
    name: &'static str,
    readiness: Readiness,
}

/// One condition of [`Readiness`]; pending until [`Latch::set`].
#[derive(Clone, Debug)]
pub struct Latch {
    name: &'static str,
    readiness: Readiness,
}

/// The signal to every part to finish begun work and accept no more.
#[derive(Debug)]
pub struct DrainSignal(watch::Sender<Phase>);

/// The receiving end of a [`DrainSignal`], one for each part.
#[derive(Clone, Debug)]
pub struct Drain(watch::Receiver<Phase>);

/// The phase of the process that the parts see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Another process continues the work; `queue`: it accepts from the same sockets.
    HandedOver {
        queue: bool,
    },
    /// No other process continues the work.
    Ending,
}

/// A connected pair: the signal for the owner, and the receiving end for the parts (clone it).
#[must_use]
pub fn drain() -> (DrainSignal, Drain) {
    let (tx, rx) = watch::channel(Phase::Running);
    (DrainSignal(tx), Drain(rx))
}

/// Does `work` until the drain begins; its end, or a panic in it, is no end of this.
pub async fn apart(part: &'static str, work: impl Future<Output = ()>, mut drain: Drain) {
    let work = async {
        if AssertUnwindSafe(work).catch_unwind().await.is_err() {
            error!(part, "A part panicked, which is a bug of the agent; going on without it");
        }
        pending::<()>().await;
    };
    tokio::select! {
        () = work => {}
        () = drain.started() => {}
    }
}

// === impl Readiness ===

impl Default for Readiness {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }
}

impl Readiness {
    /// Adds a condition, pending until it is set.
    #[must_use]
    pub fn latch(&self, name: &'static str) -> Latch {
        self.record(name, false);
        Latch { name, readiness: self.clone() }
    }

    /// Adds a fact to show beside the conditions, once it is set.
    #[must_use]
    pub fn detail(&self, name: &'static str) -> Detail {
        Detail { name, readiness: self.clone() }
    }

    /// The facts that are set, with their names.
    #[must_use]
    pub fn details(&self) -> Vec<(&'static str, Cow<'static, str>)> {
        self.0.borrow().details.iter().map(|(name, text)| (*name, text.clone())).collect()
    }

    /// The conditions that do not hold now, by name.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.borrow().latches.iter().filter(|(_, set)| !**set).map(|(name, _)| *name).collect()
    }

    /// Whether every condition holds.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pending().is_empty()
    }

    /// Waits until every condition holds.
    pub async fn ready(&self) {
        self.wait_until(|state| state.latches.values().all(|set| *set)).await;
    }

    /// Waits until all of `conditions`, which were added here, hold at once.
    pub async fn wait_for(&self, conditions: &[Latch]) {
        let holds = |state: &State| {
            conditions.iter().all(|latch| state.latches.get(latch.name) == Some(&true))
        };
        self.wait_until(holds).await;
    }

    async fn wait_until(&self, holds: impl FnMut(&State) -> bool) {
        // An error would mean that the sender is gone, and this has it.
        let _ = self.0.subscribe().wait_for(holds).await;
    }

    /// Wakes whoever waits only when something changes.
    fn record(&self, name: &'static str, set: bool) {
        self.0.send_if_modified(|state| state.latches.insert(name, set) != Some(set));
    }
}

// === impl Detail ===

impl Detail {
    /// Sets the text.
    pub fn set(&self, text: impl Into<Cow<'static, str>>) {
        self.readiness.0.send_modify(|state| {
            state.details.insert(self.name, text.into());
        });
    }

    /// Removes the text.
    pub fn clear(&self) {
        self.readiness.0.send_if_modified(|state| state.details.remove(self.name).is_some());
    }
}

// === impl Latch ===

impl Latch {
    /// Records that the condition holds.
    pub fn set(&self) {
        self.readiness.record(self.name, true);
    }

    /// Records that the condition holds no longer.
    pub fn clear(&self) {
        self.readiness.record(self.name, false);
    }
}

// === impl DrainSignal ===

impl DrainSignal {
    /// Begins the drain. A second call, or one after [`DrainSignal::hand_over`], does nothing.
    pub fn start(&self) {
        self.begin(Phase::Ending);
    }

    /// Begins the drain of a process whose work another one continues; `queue`: it accepts from the same sockets, so that
    /// new connections are for the other process.
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

    /// Whether the drain has begun because another process continues the work.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        matches!(*self.0.borrow(), Phase::HandedOver { .. })
    }

    /// Whether that process accepts from the same sockets.
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
    async fn waiting_ends_once_all_conditions_hold_at_once() {
        let readiness = Readiness::default();
        let [pods, namespaces, other] =
            ["pods", "namespaces", "other"].map(|it| readiness.latch(it));
        let (waits, conditions) = (readiness.clone(), [pods.clone(), namespaces.clone()]);
        let mut known = tokio::spawn(async move { waits.wait_for(&conditions).await });
        let ready = readiness.clone();
        let mut ready = tokio::spawn(async move { ready.ready().await });
        pods.set();
        tokio::task::yield_now().await;
        pods.clear();
        namespaces.set();
        let moment = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(moment, &mut known).await.is_err(), "not at once");
        pods.set();
        known.await.unwrap();
        assert!(tokio::time::timeout(moment, &mut ready).await.is_err(), "one is missing");
        other.set();
        ready.await.unwrap();
    }

    #[test]
    fn details_are_shown_once_set_and_do_not_decide() {
        let readiness = Readiness::default();
        let guard = readiness.detail("guard");
        assert!(readiness.details().is_empty());
        guard.set("open");
        guard.set("holds");
        assert_eq!(readiness.details(), [("guard", "holds".into())]);
        assert!(readiness.is_ready());
        guard.clear();
        assert!(readiness.details().is_empty());
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

    #[tokio::test(start_paused = true)]
    async fn what_ends_or_panics_apart_is_no_end_of_the_agent() {
        let (signal, drain) = drain();
        let panics = apart("panics", async { std::panic::panic_any(()) }, drain.clone());
        let ends = apart("ends", async {}, drain.clone());
        let goes_on = apart("goes on", pending(), drain);
        let mut all = Box::pin(async { tokio::join!(panics, ends, goes_on) });
        let hour = std::time::Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, &mut all).await.is_err());
        signal.start();
        assert!(tokio::time::timeout(hour, all).await.is_ok());
    }
}

//! Decides when the agent ends: at once, or as late as its grace period allows, so that a successor can take over.

use std::{
    fmt,
    future::pending,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep_until},
};
use tracing::warn;

/// The part of the grace period that the drain needs: open connections get 1.5 s, and what hangs a little longer.
const MARGIN: Duration = Duration::from_secs(3);
/// The part of [`MARGIN`] that detaching the programs and leaving need.
const EXIT: Duration = Duration::from_secs(1);
/// How long before it ends its service the agent asks successors to take over with what they have.
const HURRY: Duration = Duration::from_secs(10);

/// What the system asks the agent to do by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM: end within the grace period.
    Terminate,
    /// SIGINT: somebody sits in front of it.
    Interrupt,
}

/// The signals by which the system asks for the end.
pub struct Signals {
    terminate: Option<Signal>,
    interrupt: Option<Signal>,
}

/// The end of the agent's service, planned once the system has asked for it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Departure {
    grace: Duration,
    /// When SIGTERM came.
    asked: Arc<OnceLock<Instant>>,
}

/// How the agent follows a [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Course {
    /// The agent ends.
    AtOnce,
    /// It serves for so long, unless a successor takes over before.
    ServeOn(Duration),
}

// === impl Request ===

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        })
    }
}

// === impl Signals ===

impl Signals {
    /// Hears them from now on.
    #[must_use]
    pub fn hear() -> Self {
        let hear = |kind| {
            signal(kind).inspect_err(|error| warn!(%error, ?kind, "Signal can't be heard")).ok()
        };
        Self { terminate: hear(SignalKind::terminate()), interrupt: hear(SignalKind::interrupt()) }
    }

    /// Returns the next one.
    pub async fn next(&mut self) -> Request {
        tokio::select! {
            () = received(self.terminate.as_mut()) => Request::Terminate,
            () = received(self.interrupt.as_mut()) => Request::Interrupt,
        }
    }
}

async fn received(signal: Option<&mut Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    pending().await
}

// === impl Departure ===

impl Departure {
    /// Not asked for yet; from SIGTERM to SIGKILL the system waits for `grace`.
    #[must_use]
    pub fn new(grace: Duration) -> Self {
        Self { grace, asked: Arc::default() }
    }

    /// Plans the end, at the first SIGTERM. Whoever asks twice, or on a terminal, does not want to wait.
    #[must_use]
    pub fn plan(&self, request: Request) -> Course {
        let first = request == Request::Terminate && self.asked.set(Instant::now()).is_ok();
        match self.service() {
            service if first && !service.is_zero() => Course::ServeOn(service),
            _ => Course::AtOnce,
        }
    }

    /// Whether the end is planned.
    #[must_use]
    pub fn is_planned(&self) -> bool {
        self.asked.get().is_some()
    }

    /// Returns when the service has to end; never before that is planned.
    pub async fn due(&self) {
        match self.asked.get() {
            Some(asked) => sleep_until(*asked + self.service()).await,
            None => pending().await,
        }
    }

    /// Whether that is so soon that a successor must take over with what it has.
    #[must_use]
    pub fn is_near(&self) -> bool {
        let hurry = HURRY.min(self.service() / 2);
        self.asked.get().is_some_and(|asked| asked.elapsed() + hurry >= self.service())
    }

    /// When open connections are given up, where it is known how long the system waits.
    #[must_use]
    pub fn limit(&self) -> Option<Instant> {
        let asked = self.asked.get().filter(|_| !self.grace.is_zero())?;
        Some(*asked + self.grace.saturating_sub(EXIT))
    }

    /// How long the agent serves after SIGTERM.
    fn service(&self) -> Duration {
        self.grace.saturating_sub(MARGIN)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn first_sigterm_leaves_time_for_a_successor_and_anything_else_ends_at_once() {
        let departure = Departure::new(30 * SECOND);
        let offers = departure.clone();
        assert!(timeout(100 * SECOND, departure.due()).await.is_err(), "nobody has asked");
        assert!(!departure.is_planned() && departure.limit().is_none());
        let began = Instant::now();
        assert_eq!(departure.plan(Request::Terminate), Course::ServeOn(27 * SECOND));
        assert!(departure.is_planned() && !offers.is_near());
        advance(16 * SECOND).await;
        assert!(!offers.is_near());
        advance(SECOND).await;
        assert!(offers.is_near(), "10 s before the end");
        departure.due().await;
        assert_eq!(began.elapsed().as_secs(), 27);
        assert_eq!(departure.limit(), Some(began + 29 * SECOND));
        assert_eq!(departure.plan(Request::Terminate), Course::AtOnce, "a second one");
        let interactive = Departure::new(30 * SECOND);
        assert_eq!(interactive.plan(Request::Interrupt), Course::AtOnce);
        assert!(!interactive.is_planned());
    }

    #[tokio::test(start_paused = true)]
    async fn grace_period_that_is_too_short_to_wait_in_bounds_the_drain_alone() {
        for (grace, limit) in [(0, None), (1, Some(0)), (3, Some(2))] {
            let departure = Departure::new(grace * SECOND);
            let began = Instant::now();
            assert_eq!(departure.plan(Request::Terminate), Course::AtOnce, "{grace} s");
            assert_eq!(departure.limit(), limit.map(|limit: u32| began + limit * SECOND));
        }
        let short = Departure::new(5 * SECOND);
        assert_eq!(short.plan(Request::Terminate), Course::ServeOn(2 * SECOND));
        assert!(!short.is_near(), "half of it is the successor's");
        advance(SECOND).await;
        assert!(short.is_near());
    }
}

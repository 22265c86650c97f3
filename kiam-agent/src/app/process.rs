//! What the parts of the agent have in common while they run.

use std::{net::SocketAddr, time::Duration};

use prometheus_client::registry::Registry;
use tokio::task::JoinSet;

use super::error::Error;
use crate::admin;
use kiam_core::{
    clock::Clock,
    lifecycle::{self, Drain, DrainSignal, Latch, Readiness},
    telemetry::Statsd,
};

/// The parts that run, and what each of them may use.
pub(super) struct Process {
    pub(super) registry: Registry,
    pub(super) statsd: Statsd,
    pub(super) readiness: Readiness,
    /// Set while the lease is renewed. Made first, as [`Self::serving`] is, so that the agent is not ready before the last step.
    pub(super) attached: Latch,
    pub(super) serving: Latch,
    pub(super) clock: Clock,
    pub(super) signal: DrainSignal,
    pub(super) drain: Drain,
    /// The parts. They end once the drain begins, and must not before.
    pub(super) tasks: JoinSet<()>,
}

// === impl Process ===

impl Process {
    /// No parts yet but the one that writes to the StatsD server, at an interval.
    pub(super) fn new(statsd: Option<(SocketAddr, Duration)>) -> Result<Self, Error> {
        let (signal, drain) = lifecycle::drain();
        let readiness = Readiness::default();
        let mut process = Self {
            registry: Registry::default(),
            statsd: Statsd::off(),
            attached: readiness.latch("kernel programs attached"),
            serving: readiness.latch("serving pods"),
            readiness,
            clock: Clock::system(),
            signal,
            drain,
            tasks: JoinSet::new(),
        };
        let (readiness, clock) = (process.readiness.clone(), process.clock.clone());
        admin::register_metrics(&mut process.registry, readiness, clock);
        if let Some((server, interval)) = statsd {
            let (statsd, flush) = Statsd::to(server, interval).map_err(Error::Statsd)?;
            process.statsd = statsd;
            process.spawn(flush.run(process.drain.clone()));
        }
        Ok(process)
    }

    /// Runs a part without which the agent must not go on.
    pub(super) fn spawn(&mut self, part: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(part);
    }

    /// Runs a part that the agent can do without, until the drain begins.
    pub(super) fn spawn_apart(
        &mut self,
        name: &'static str,
        part: impl Future<Output = ()> + Send + 'static,
    ) {
        self.tasks.spawn(lifecycle::apart(name, part, self.drain.clone()));
    }
}

//! Keeps the kernel programs attached while the agent lives.
//!
//! A [`Sentry`] compares the links and pins with those that this agent left, and wakes the keeper, which restores what is
//! missing. It leaves to another agent what that agent has replaced.

mod sentry;

use std::{io, panic::resume_unwind, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

use self::sentry::Sentry;
use crate::{
    identity::CgroupPaths,
    intercept::{
        Drift, Error, Flows, Interception, KernelLog, RestoreOutcome, RestoredMetrics, Snapshot,
    },
    pins::AgentLock,
};
use kiam_core::{
    blocking::{self, Blocking},
    lifecycle::{Drain, Latch, Readiness},
    ticks::ticks,
};

/// The time between two scans while something is not as this agent left it. Pods that start in a new pods' cgroup are not
/// intercepted until a scan has found it.
const SCAN: Duration = Duration::from_millis(200);
/// The time between two scans while everything is, beside those for which the sentry wakes the keeper.
const CHECK: Duration = Duration::from_secs(30);
/// The interval at which the kernel programs' log is passed on.
const LOG: Duration = Duration::from_secs(1);
/// The interval of sweeps of flows, and of searches for other cgroups and programs.
const SWEEP: Duration = Duration::from_secs(60);
/// Scans in a row that find another agent's programs, after which that agent did not take over: this agent would have heard
/// of a takeover sooner.
const REPLACED: u32 = 5;

/// The task that keeps the programs attached.
pub struct Keeper {
    flows: Flows,
    log: Option<KernelLog>,
    /// `None` only while they are worked on.
    programs: Option<Interception>,
    cgroups: CgroupPaths,
    in_place: Latch,
    whole: Latch,
    /// Cleared while there are pods in other cgroups than the programs are attached to.
    only: Latch,
    elsewhere: Problem,
    /// Why the programs could not be attached to the pods' cgroup, or the cgroup not be marked.
    cgroup: Problem,
    /// Why the programs and pins are not as this agent left them.
    programs_or_pins: Problem,
    /// Why others can't see that the pins are in use.
    unshared: Problem,
    /// Scans in a row that found another agent's programs.
    replaced: u32,
    sentry: Sentry,
    /// Whether the sentry compares the state of the last scan, which found nothing wrong.
    guarded: bool,
    agent_lock: AgentLock,
    restored: RestoredMetrics,
    /// Notified when the programs may be those of another agent that did not come to serve.
    reassert: Arc<Notify>,
}

/// What a keeper looks after.
pub struct Installation {
    /// The programs.
    pub programs: Interception,
    /// The connections; old entries are swept.
    pub flows: Flows,
    /// What the programs log, if they do.
    pub log: Option<KernelLog>,
    /// The pods' cgroups, which follow the programs.
    pub cgroups: CgroupPaths,
    /// This agent's share of the pins.
    pub agent_lock: AgentLock,
}

/// A problem that every scan may find, and that is logged once.
#[derive(Default)]
struct Problem(String);

// === impl Problem ===

impl Problem {
    /// Has `log` report the problem, unless it is the one that was reported last.
    fn report(&mut self, problem: impl ToString, log: impl FnOnce(&str)) {
        let problem = problem.to_string();
        if self.0 != problem {
            log(&problem);
            self.0 = problem;
        }
    }

    fn clear(&mut self) {
        self.0.clear();
    }
}

// === impl Keeper ===

impl Keeper {
    /// Keeps `installation`, and attaches the programs again whenever `reassert` is notified.
    ///
    /// # Errors
    ///
    /// The system gives no thread for the sentry.
    pub fn new(
        installation: Installation,
        reassert: Arc<Notify>,
        registry: &mut Registry,
        readiness: &Readiness,
    ) -> io::Result<Self> {
        let Installation { programs, flows, log, cgroups, agent_lock } = installation;
        let in_place = readiness.latch("programs at the pods' cgroup, which was recreated");
        in_place.set();
        let whole = readiness.latch("restoring detached programs or pins");
        whole.set();
        let only = readiness.latch("one pods' cgroup, of several in use");
        only.set();
        Ok(Self {
            flows,
            log,
            programs: Some(programs),
            cgroups,
            in_place,
            whole,
            only,
            elsewhere: Problem::default(),
            cgroup: Problem::default(),
            programs_or_pins: Problem::default(),
            unshared: Problem::default(),
            replaced: 0,
            sentry: Sentry::start()?,
            guarded: false,
            agent_lock,
            restored: RestoredMetrics::register(registry),
            reassert,
        })
    }

    /// Runs until the drain begins.
    pub async fn run(mut self, mut drain: Drain) {
        let (mut scans, mut checks) = (ticks(SCAN), ticks(CHECK));
        let (mut logs, mut sweeps) = (ticks(LOG), ticks(SWEEP));
        let reassert = self.reassert.clone();
        loop {
            tokio::select! {
                _ = scans.tick(), if !self.guarded => {}
                _ = checks.tick(), if self.guarded => {}
                stands = self.sentry.noticed() => match stands {
                    true => self.guarded = false,
                    // It panicked. This part of the agent ends, and so does the agent.
                    false => break,
                },
                _ = logs.tick(), if self.log.is_some() => {
                    self.log.iter_mut().for_each(KernelLog::flush);
                    continue;
                }
                _ = sweeps.tick() => {
                    self.flows.sweep();
                    self.follow_ancestors().await;
                    self.find_other_cgroups().await;
                    continue;
                }
                () = reassert.notified() => self.reassert().await,
                () = drain.started() => break,
            }
            self.scan().await;
        }
    }

    /// Follows the pods' cgroup to where it is.
    async fn scan(&mut self) {
        if self
            .work(|_, programs| Ok(programs.is_in_place()))
            .await
            .is_none_or(|known| known.unwrap_or(true))
        {
            self.follow_classes().await;
            self.restore().await;
            return self.stay_in_use();
        }
        self.in_place.clear();
        self.guarded = false;
        match self.work(|token, programs| programs.follow(token)).await {
            Some(Ok(cgroup)) => {
                warn!(cgroup = %cgroup.path().display(), "The pods' cgroup was recreated; kernel programs attached to it");
                self.cgroups.follow(cgroup);
                self.cgroup.clear();
                self.in_place.set();
            }
            Some(Err(failure)) => self.cgroup.report(failure, |error| {
                warn!(%error, "The pods' cgroup is gone; waiting for the next one");
            }),
            None => {}
        }
    }

    /// Marks the cgroups of QoS classes. The kubelet makes them at its start, which may be after the agent's.
    async fn follow_classes(&mut self) {
        let follow = |token: &Blocking, programs: &mut Interception| {
            let follows = !programs.knows_classes(token);
            if follows { programs.follow_classes(token).map(|()| true) } else { Ok(false) }
        };
        match self.work(follow).await {
            Some(Ok(false)) => {}
            Some(Ok(true)) => {
                debug!("Cgroups of QoS classes marked");
                self.cgroup.clear();
            }
            Some(Err(failure)) => self.cgroup.report(failure, |error| {
                error!(%error, "Cgroups of QoS classes not marked: all pods of one share a quota");
            }),
            None => {}
        }
    }

    /// Restores detached programs and removed pins. If the agent ended instead and left that to the next one, pods would
    /// reach the real IMDS until then, and nobody would answer them.
    async fn restore(&mut self) {
        // In this order, so that the sentry sees whatever changes after the comparison.
        let compare = |_: &Blocking, programs: &mut Interception| {
            let snapshot = programs.snapshot();
            Ok((programs.drift()?, snapshot))
        };
        match self.work(compare).await {
            None => return,
            Some(Ok((losses, snapshot))) if losses.is_empty() => {
                self.whole.set();
                self.programs_or_pins.clear();
                self.replaced = 0;
                return self.leave_to_sentry(snapshot);
            }
            // An agent that takes over replaces the programs before it serves, and this one serves until then.
            Some(Ok((losses, _))) if !losses.replaced.is_empty() => {}
            _ => self.whole.clear(),
        }
        self.guarded = false;
        match self.work(|_, programs| programs.restore()).await {
            Some(Ok(RestoreOutcome::Done(losses))) => self.report(&losses),
            Some(Ok(RestoreOutcome::Replaced)) => self.yield_or_reassert().await,
            Some(Ok(RestoreOutcome::Busy)) => {
                debug!("Another agent attaches its programs; leaving the detached ones to it");
            }
            Some(Ok(RestoreOutcome::Left(losses))) => self.programs_or_pins.report(format!("{losses:?}"), |_| {
                warn!(
                    detached = ?losses.detached, unpinned = ?losses.unpinned,
                    "Kernel programs were detached or pins removed while another agent attaches its own; this agent restores them in 2 s if that one does not serve by then"
                );
            }),
            Some(Err(failure)) => self.programs_or_pins.report(failure, |error| {
                error!(%error, "Detached kernel programs or removed pins can't be restored");
            }),
            None => {}
        }
    }

    /// Has the sentry compare `snapshot`, the state that was found to be right.
    fn leave_to_sentry(&mut self, snapshot: Result<Snapshot, Error>) {
        match snapshot {
            Ok(snapshot) => {
                self.sentry.expect(snapshot);
                self.guarded = true;
            }
            // Something is gone again, as the next scan shows.
            Err(_) => self.guarded = false,
        }
    }

    fn report(&mut self, losses: &Drift) {
        self.restored.count(losses);
        if !losses.is_empty() {
            warn!(
                detached = ?losses.detached, unpinned = ?losses.unpinned,
                "Restored detached kernel programs or removed pins"
            );
        }
    }

    /// Shares the folder of the pins that is there now: it may have been replaced, and a share may be lost.
    fn stay_in_use(&mut self) {
        match self.agent_lock.follow() {
            Err(failure) => self.unshared.report(failure, |error| {
                warn!(%error, "Others can't see that an agent uses the pins");
            }),
            Ok(()) => self.unshared.clear(),
        }
    }

    /// Leaves the programs to another agent that has attached its own and not taken over, for as long as that agent lives.
    /// Without another agent, the one that attached them died before it served.
    async fn yield_or_reassert(&mut self) {
        self.replaced = self.replaced.saturating_add(1);
        if self.replaced < REPLACED {
            return;
        }
        self.whole.clear();
        if self.agent_lock.is_alone().unwrap_or(false) {
            return self.reassert().await;
        }
        let problem = "another agent has attached its kernel programs and did not take over from this one: does it use another --state-dir?";
        self.programs_or_pins
            .report(problem, |error| error!(%error, "Pods don't come to this agent"));
    }

    /// Finds pods below other cgroups: a kubelet that was given another cgroup driver puts them where no programs are.
    async fn find_other_cgroups(&mut self) {
        match self.work(|token, programs| Ok(programs.other_roots(token))).await {
            Some(Ok(others)) if !others.is_empty() => {
                self.only.clear();
                self.elsewhere.report(format!("{others:?}"), |cgroups| {
                    error!(cgroups, "Pods in these cgroups are not intercepted: the kubelet's cgroup driver may be another one now; drain the node and restart the agent, or name the pods' cgroup with --cgroup");
                });
            }
            Some(_) => {
                self.only.set();
                self.elsewhere.clear();
            }
            None => {}
        }
    }

    /// Guards packets once another program is attached above the pods' cgroup: a socket load balancer may be installed after
    /// the agent, and its programs run after the agent's.
    async fn follow_ancestors(&mut self) {
        match self.work(|_, programs| programs.follow_ancestors()).await {
            Some(Ok(true)) => {
                warn!("Found programs above the pods' cgroup: guarding packets from now on");
            }
            Some(Err(failure)) => {
                error!(error = %failure, "Programs above the pods' cgroup may get past the hooks");
            }
            _ => {}
        }
    }

    /// Attaches this agent's programs again. After a failure, the next attempt follows when as many scans have found other
    /// programs.
    async fn reassert(&mut self) {
        self.replaced = 0;
        match self.work(|token, programs| programs.reassert(token)).await {
            Some(Ok(())) => info!("Kernel programs are in place"),
            Some(Err(failure)) => self.programs_or_pins.report(failure, |error| {
                error!(%error, "Kernel programs can't be attached again");
            }),
            None => {}
        }
    }

    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&Blocking, &mut Interception) -> Result<T, Error> + Send + 'static,
    ) -> Option<Result<T, Error>> {
        let (programs, result) = with(self.programs.take()?, work).await?;
        self.programs = Some(programs);
        Some(result)
    }
}

/// Does `work`, which blocks, on another thread. A panic in it leaves `programs` in an unknown state, so it is resumed here and
/// ends the agent; the next agent begins with what is attached. `None` when the runtime ends.
async fn with<P: Send + 'static, T: Send + 'static>(
    mut programs: P,
    work: impl FnOnce(&Blocking, &mut P) -> T + Send + 'static,
) -> Option<(P, T)> {
    let done = blocking::spawn(move |token| {
        let result = work(token, &mut programs);
        (programs, result)
    });
    match done.await {
        Ok(done) => Some(done),
        Err(error) if error.is_panic() => resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_in_the_work_ends_the_keeper_and_so_the_agent() {
        assert_eq!(with(1, |_, programs| *programs + 1).await, Some((1, 2)));
        let panics = with((), |_, ()| -> () { resume_unwind(Box::new("without its message")) });
        let ended = tokio::spawn(panics).await;
        assert!(ended.is_err_and(|error| error.is_panic()));
    }
}

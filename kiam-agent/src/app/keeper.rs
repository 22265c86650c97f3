//! What has to be done again and again for the kernel's part.

use std::{panic::resume_unwind, sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use kiam_core::{
    blocking::{self, Blocking},
    lifecycle::{Drain, Latch, Readiness},
};
use kiam_kernel::{
    identity::CgroupPaths,
    intercept::{Drift, Error, Flows, Interception, KernelLog, RestoreOutcome, RestoredMetrics},
    pins::AgentLock,
};

/// How often it is looked whether the pods' cgroup is the one that the programs are attached to: pods that start
/// in a new one are not held until that is found out.
const LOOK: Duration = Duration::from_millis(200);
/// Passing on what the kernel programs log, in looks.
const LOG: u32 = 5;
/// Sweeps, in looks.
const SWEEP: u32 = 300;
/// Looks that see another agent's programs, which does not attach any more: when it took over, this one is told that
/// sooner.
const REPLACED: u32 = 5;

/// Keeps the programs attached while the agent lives.
pub(super) struct Keeper {
    flows: Flows,
    log: Option<KernelLog>,
    /// `None` only while they are worked on.
    programs: Option<Interception>,
    cgroups: CgroupPaths,
    in_place: Latch,
    whole: Latch,
    /// Cleared while there are pods in other cgroups than the programs are attached to.
    only: Latch,
    elsewhere: Told,
    /// What kept the programs from the pods' cgroup, or it from being marked, when it was last tried.
    problem: Told,
    /// What keeps the programs and pins from being as they were left.
    amiss: Told,
    /// What keeps others from seeing that the pins are in use.
    unseen: Told,
    /// Looks in a row that saw another agent's programs.
    replaced: u32,
    agent_lock: Option<AgentLock>,
    restored: RestoredMetrics,
    /// Told when the programs may be another agent's that did not come to serve.
    reassert: Arc<Notify>,
}

/// A problem that is looked at again and again, and told once.
#[derive(Default)]
struct Told(String);

// === impl Told ===

impl Told {
    /// Has `log` tell of it, unless it is the problem that was told last.
    fn tell(&mut self, problem: impl ToString, log: impl FnOnce(&str)) {
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
    pub(super) fn new(
        (programs, flows, log): (Interception, Flows, Option<KernelLog>),
        cgroups: CgroupPaths,
        agent_lock: Option<AgentLock>,
        reassert: Arc<Notify>,
        (registry, readiness): (&mut Registry, &Readiness),
    ) -> Self {
        let in_place = readiness.latch("programs at the pods' cgroup, which was re-created");
        in_place.set();
        let whole = readiness.latch("kernel programs and pins, which somebody took away");
        whole.set();
        let only = readiness.latch("one pods' cgroup, of several in use");
        only.set();
        Self {
            flows,
            log,
            programs: Some(programs),
            cgroups,
            in_place,
            whole,
            only,
            elsewhere: Told::default(),
            problem: Told::default(),
            amiss: Told::default(),
            unseen: Told::default(),
            replaced: 0,
            agent_lock,
            restored: RestoredMetrics::register(registry),
            reassert,
        }
    }

    /// Until the drain begins.
    pub(super) async fn run(mut self, mut drain: Drain) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count = 0_u32;
        let reassert = self.reassert.clone();
        loop {
            tokio::select! {
                _ = looks.tick() => {}
                () = reassert.notified() => self.reassert().await,
                () = drain.started() => break,
            }
            if let Some(log) = self.log.as_mut().filter(|_| count.is_multiple_of(LOG)) {
                log.flush();
            }
            if count.is_multiple_of(SWEEP) {
                self.flows.sweep();
                self.follow_ancestors().await;
                self.look_elsewhere().await;
            }
            count = count.wrapping_add(1);
            self.look().await;
        }
    }

    /// Follows the pods' cgroup to where it is.
    async fn look(&mut self) {
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
        match self.work(|token, programs| programs.follow(token)).await {
            Some(Ok(cgroup)) => {
                warn!(cgroup = %cgroup.path().display(), "The pods' cgroup was re-created; kernel programs attached to it");
                self.cgroups.follow(cgroup);
                self.problem.clear();
                self.in_place.set();
            }
            Some(Err(failure)) => self.problem.tell(failure, |error| {
                warn!(%error, "The pods' cgroup is gone; waiting for the next one");
            }),
            None => {}
        }
    }

    /// The kubelet makes the cgroups of QoS classes at its start, which may be after the agent's.
    async fn follow_classes(&mut self) {
        let follow = |token: &Blocking, programs: &mut Interception| {
            let follows = !programs.knows_classes(token);
            if follows { programs.follow_classes(token).map(|()| true) } else { Ok(false) }
        };
        match self.work(follow).await {
            Some(Ok(false)) => {}
            Some(Ok(true)) => {
                debug!("Cgroups of QoS classes marked");
                self.problem.clear();
            }
            Some(Err(failure)) => self.problem.tell(failure, |error| {
                error!(%error, "Cgroups of QoS classes not marked: all pods of one share a quota");
            }),
            None => {}
        }
    }

    /// Attaches and pins again what somebody has detached or unpinned. The agent could end instead and have the next one do
    /// it; but until that serves, what is detached would let pods through, and nobody would answer them.
    async fn restore(&mut self) {
        match self.work(|_, programs| programs.drift()).await {
            None => return,
            Some(Ok(losses)) if losses.is_empty() => {
                self.whole.set();
                self.amiss.clear();
                self.replaced = 0;
                return;
            }
            // An agent that takes over replaces them before it serves: until then this one does.
            Some(Ok(losses)) if !losses.replaced.is_empty() => {}
            _ => self.whole.clear(),
        }
        match self.work(|_, programs| programs.restore()).await {
            Some(Ok(RestoreOutcome::Done(losses))) => self.report(&losses),
            Some(Ok(RestoreOutcome::Replaced)) => self.yield_or_reassert().await,
            Some(Ok(RestoreOutcome::Busy)) => {
                debug!("Another agent attaches its programs; leaving what was taken away to it");
            }
            Some(Ok(RestoreOutcome::Left(losses))) => self.amiss.tell(format!("{losses:?}"), |_| {
                warn!(
                    detached = ?losses.detached, unpinned = ?losses.unpinned,
                    "Somebody took kernel programs or pins away while another agent attaches its own; they are put back in two seconds, if it does not come to serve"
                );
            }),
            Some(Err(failure)) => self.amiss.tell(failure, |error| {
                error!(%error, "Kernel programs or pins that somebody took away are not back");
            }),
            None => {}
        }
    }

    fn report(&mut self, losses: &Drift) {
        self.restored.count(losses);
        if !losses.is_empty() {
            warn!(
                detached = ?losses.detached, unpinned = ?losses.unpinned,
                "Somebody took kernel programs or pins away; they are back"
            );
        }
    }

    /// The folder of the pins may be another one, and a share may get lost.
    fn stay_in_use(&mut self) {
        match self.agent_lock.as_mut().map(AgentLock::follow) {
            Some(Err(failure)) => self.unseen.tell(failure, |error| {
                warn!(%error, "Others can't see that an agent uses the pins");
            }),
            _ => self.unseen.clear(),
        }
    }

    /// Another agent's programs work, and it did not take over from this one: they are left to it as long as there is
    /// another agent. When none is, it died before it served.
    async fn yield_or_reassert(&mut self) {
        self.replaced = self.replaced.saturating_add(1);
        if self.replaced < REPLACED {
            return;
        }
        self.whole.clear();
        if self.agent_lock.as_mut().is_some_and(|agent_lock| agent_lock.is_alone().unwrap_or(false))
        {
            return self.reassert().await;
        }
        let problem = "another agent has attached its kernel programs and did not take over from this one: one with another --state-dir?";
        self.amiss.tell(problem, |error| error!(%error, "Pods don't come to this agent"));
    }

    /// A kubelet that was given another cgroup driver puts pods where no programs are.
    async fn look_elsewhere(&mut self) {
        match self.work(|token, programs| Ok(programs.other_roots(token))).await {
            Some(Ok(others)) if !others.is_empty() => {
                self.only.clear();
                self.elsewhere.tell(format!("{others:?}"), |cgroups| {
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

    /// A socket load balancer may come after the agent, and runs after its programs.
    async fn follow_ancestors(&mut self) {
        match self.work(|_, programs| programs.follow_ancestors()).await {
            Some(Ok(true)) => {
                warn!("Programs above the pods' cgroup: packets are guarded too from now on");
            }
            Some(Err(failure)) => {
                error!(error = %failure, "Programs above the pods' cgroup may get past the hooks");
            }
            _ => {}
        }
    }

    /// Where that fails, it is tried again once it was seen as often that they are replaced.
    async fn reassert(&mut self) {
        self.replaced = 0;
        match self.work(|token, programs| programs.reassert(token)).await {
            Some(Ok(())) => info!("Kernel programs are in place"),
            Some(Err(failure)) => self.amiss.tell(failure, |error| {
                error!(%error, "Kernel programs not put back");
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

/// Attaching blocks. Whoever panics in it leaves `programs` in no known state: the panic goes on here and ends the agent,
/// and the next one begins with what is attached. `None` when the runtime ends.
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

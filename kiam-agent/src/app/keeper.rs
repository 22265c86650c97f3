//! What has to be done again and again for the kernel's part.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, info, warn};

use crate::{
    identity::CgroupPaths,
    intercept::{Error, Flows, Interception, KernelLog, Lease, Parts},
    lifecycle::{Drain, Latch, Readiness},
};

/// How often it is looked whether the pods' cgroup is the one that the programs are attached to: pods that start
/// in a new one are not held until that is found out.
const LOOK: Duration = Duration::from_millis(200);
/// Renewals of the lease, in looks.
const RENEWAL: u32 = 5;
/// Sweeps, in looks.
const SWEEP: u32 = 300;

/// Renews the lease while the agent lives, keeps the programs attached, and ends the lease when the agent drains,
/// unless another goes on with it.
pub(super) struct Keeper {
    lease: Lease,
    flows: Flows,
    log: Option<KernelLog>,
    /// `None` only while they are worked on.
    programs: Option<Interception>,
    cgroups: CgroupPaths,
    attached: Latch,
    in_place: Latch,
    /// What kept the programs from the pods' cgroup, or it from being marked, when it was last tried; told once.
    problem: String,
    /// Told when the programs may be another agent's that did not come to serve.
    reassert: Arc<Notify>,
}

// === impl Keeper ===

impl Keeper {
    pub(super) fn new(
        parts: Parts,
        cgroups: CgroupPaths,
        attached: Latch,
        readiness: &Readiness,
        reassert: Arc<Notify>,
    ) -> Self {
        let in_place = readiness.latch("programs at the pods' cgroup, which was re-created");
        in_place.set();
        let Parts { lease, flows, log, programs, .. } = parts;
        let programs = Some(programs);
        let problem = String::new();
        Self { lease, flows, log, programs, cgroups, attached, in_place, problem, reassert }
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
            if count.is_multiple_of(RENEWAL) {
                self.renew();
            }
            if count.is_multiple_of(SWEEP) {
                self.flows.sweep();
                self.follow_ancestors().await;
            }
            count = count.wrapping_add(1);
            self.look().await;
        }
        self.attached.clear();
        if drain.is_handed_over() {
            return;
        }
        if let Err(failure) = self.lease.end() {
            error!(error = %failure, "Lease not ended; it runs out by itself");
        }
    }

    fn renew(&mut self) {
        match self.lease.renew() {
            Ok(()) => self.attached.set(),
            Err(failure) => {
                self.attached.clear();
                error!(error = %failure, "Lease not renewed: the kernel denies pods' IMDS traffic");
            }
        }
        if let Some(log) = &mut self.log {
            log.flush();
        }
    }

    /// Follows the pods' cgroup to where it is.
    async fn look(&mut self) {
        if self.programs.as_ref().is_none_or(Interception::is_in_place) {
            return self.follow_classes().await;
        }
        self.in_place.clear();
        match self.work(Interception::follow).await {
            Some(Ok(cgroup)) => {
                warn!(cgroup = %cgroup.path().display(), "The pods' cgroup was re-created; kernel programs attached to it");
                self.cgroups.follow(cgroup);
                self.problem.clear();
                self.in_place.set();
            }
            Some(Err(failure)) => {
                let problem = failure.to_string();
                if self.problem != problem {
                    warn!(error = %problem, "The pods' cgroup is gone; waiting for the next one");
                    self.problem = problem;
                }
            }
            None => {}
        }
    }

    /// The kubelet makes the cgroups of QoS classes at its start, which may be after the agent's.
    async fn follow_classes(&mut self) {
        if self.programs.as_ref().is_none_or(Interception::knows_classes) {
            return;
        }
        match self.work(Interception::follow_classes).await {
            Some(Ok(())) => {
                debug!("Cgroups of QoS classes marked");
                self.problem.clear();
            }
            Some(Err(failure)) => {
                let problem = failure.to_string();
                if self.problem != problem {
                    error!(error = %problem, "Cgroups of QoS classes not marked: all pods of one share a quota");
                    self.problem = problem;
                }
            }
            None => {}
        }
    }

    /// A socket load balancer may come after the agent, and runs after its programs.
    async fn follow_ancestors(&mut self) {
        match self.work(Interception::follow_ancestors).await {
            Some(Ok(true)) => {
                warn!("Programs above the pods' cgroup: packets are guarded too from now on");
            }
            Some(Err(failure)) => {
                error!(error = %failure, "Programs above the pods' cgroup may get past the hooks");
            }
            _ => {}
        }
    }

    async fn reassert(&mut self) {
        match self.work(Interception::reassert).await {
            Some(Ok(())) => info!("Kernel programs are in place"),
            Some(Err(failure)) => error!(error = %failure, "Kernel programs not put back"),
            None => {}
        }
    }

    /// Attaching blocks.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Interception) -> Result<T, Error> + Send + 'static,
    ) -> Option<Result<T, Error>> {
        let mut programs = self.programs.take()?;
        let done = spawn_blocking(move || {
            let result = work(&mut programs);
            (programs, result)
        });
        // A panic in it was logged, and leaves what is attached as it is.
        let (programs, result) = done.await.ok()?;
        self.programs = Some(programs);
        Some(result)
    }
}

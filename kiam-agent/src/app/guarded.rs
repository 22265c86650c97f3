//! The fifth step: the guard, the self-test, and what keeps the programs at work: the lease and the keeper.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use tokio::sync::{Notify, watch};
use tracing::{Instrument as _, info, info_span};

use super::{
    attached::Kernel, error::Error, knowledge::Knowledge, prepared::Core, process::Process,
    serving::Serving,
};
use crate::{
    handover::{OperatorSockets, Takeover},
    observe::{self, Observer},
    pod_listeners::OpenListeners,
};
use kiam_kernel::{
    guard::{self, BootGuard, Guard},
    identity::CgroupPaths,
    intercept::{self, InterceptionParts, Mode, Observations, Shortage},
    keeper::{Installation, Keeper},
    selftest::{Selftest, SelftestStatus, Witness},
};

/// An agent that serves, guards and renews the lease, beside the one before it, if that still runs.
pub(super) struct Guarded {
    pub(super) core: Core,
    /// What is detached at the end, with `--detach-on-exit`.
    pub(super) detach: Option<PathBuf>,
    pub(super) operator_sockets: OperatorSockets,
    pub(super) pods: Vec<SocketAddr>,
    pub(super) open: OpenListeners,
    pub(super) takeover: Takeover,
    pub(super) republish: Arc<Notify>,
    /// Notified when the keeper is to attach the programs again.
    pub(super) reassert: Arc<Notify>,
    /// To be notified once no other agent accepts pods' connections, which the self-test waits for.
    pub(super) alone: Arc<Notify>,
}

// === impl Serving ===

impl Serving {
    /// Guards what slips past the programs and begins to test that nothing does; then renews the lease, and keeps the programs
    /// in place.
    pub(super) async fn guard(self) -> Result<Guarded, Error> {
        let Self { mut core, kernel, witness, .. } = self;
        let (reassert, alone) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let mut detach = None;
        match kernel {
            None => core.process.attached.set(),
            Some(mut kernel) => {
                detach = core.end.detach_on_exit.then(|| kernel.config.bpffs.clone());
                let bypassed = guard(&mut core.process, &kernel.config, &mut kernel.parts).await?;
                core.knowledge.exposure.follow(bypassed);
                if kernel.config.mode == Mode::Enforce {
                    test(&mut core.process, &kernel.config, &kernel.parts, witness, alone.clone());
                }
                if let Some(observed) = kernel.parts.observed.take() {
                    let cgroups = kernel.cgroups.clone();
                    observe(&mut core.process, observed, cgroups, &core.knowledge);
                }
                keep(&mut core.process, kernel, reassert.clone())?;
            }
        }
        Ok(Guarded {
            core,
            detach,
            operator_sockets: self.operator_sockets,
            pods: self.pods,
            open: self.open,
            takeover: self.takeover,
            republish: self.republish,
            reassert,
            alone,
        })
    }
}

/// Sets the guard up, and keeps it until the drain. Returns whether pods' packets pass its rules.
async fn guard(
    process: &mut Process,
    config: &intercept::Config,
    parts: &mut InterceptionParts,
) -> Result<watch::Receiver<bool>, Error> {
    let Process { registry, readiness, drain, tasks, .. } = process;
    let metrics = guard::Metrics::register(registry);
    let shown = (readiness.detail("guard route"), readiness.latch("older connections ended"));
    let asked = config.guard(parts.guards_packets);
    let uplink = parts.uplink.take();
    let guarded = parts.guards_packets || uplink.is_some();
    let ends_hosts = config.ends_host_connections(guarded, parts.first);
    if let (Some(folder), Some(preference)) = (&config.boot_guard, asked.route) {
        let detail = readiness.detail("boot guard");
        let boot = BootGuard::new(folder.clone(), preference, metrics.clone(), detail);
        tasks.spawn(boot.keep(drain.clone()).instrument(info_span!("boot guard")));
    }
    let guard = Guard::start(asked, ends_hosts, &parts.cgroup, uplink, metrics, shown).await;
    let guard = guard.map_err(intercept::Error::from)?;
    let bypassed = guard.bypassed();
    tasks.spawn(guard.keep(drain.clone()).instrument(info_span!("guard")));
    Ok(bypassed)
}

/// Tests the interception until the drain, from when this agent is `alone`; it is not ready before the first self-test
/// succeeds.
fn test(
    process: &mut Process,
    config: &intercept::Config,
    parts: &InterceptionParts,
    witness: Witness,
    alone: Arc<Notify>,
) {
    let status = SelftestStatus::new(&mut process.registry, &process.readiness);
    let selftest = Selftest::new(config, parts, witness);
    let kept = selftest.keep(status, alone, process.drain.clone());
    process.spawn(kept.instrument(info_span!("selftest")));
}

/// Reports who asks for the IMDS, with `--mode=observe`.
fn observe(
    process: &mut Process,
    observed: Observations,
    cgroups: CgroupPaths,
    knowledge: &Knowledge,
) {
    let observer = Observer {
        observed,
        cgroups,
        pods: knowledge.pods.clone(),
        policy: knowledge.policy.clone(),
        sightings: knowledge.sightings.clone(),
        metrics: observe::Metrics::register(&mut process.registry),
    };
    process.spawn(observer.run(process.drain.clone()));
}

/// Renews the lease, and keeps the programs in place, from now on.
fn keep(process: &mut Process, kernel: Kernel, reassert: Arc<Notify>) -> Result<(), Error> {
    let Kernel { parts, cgroups, agent_lock, .. } = kernel;
    let InterceptionParts { lease, flows, log, programs, cgroup, verdicts, .. } = parts;
    info!(cgroup = %cgroup.path().display(), "Kernel programs attached");
    let (attached, drain) = (process.attached.clone(), process.drain.clone());
    let renewed = intercept::keep_renewed(lease, attached, &mut process.registry, drain);
    process.spawn(renewed.map_err(Error::Thread)?);
    let shortage = Shortage::new(verdicts.clone(), &process.readiness);
    process.spawn(shortage.run(process.drain.clone()));
    verdicts.register(&mut process.registry);
    let installation = Installation { programs, flows, log, cgroups, agent_lock };
    let (registry, readiness) = (&mut process.registry, &process.readiness);
    let keeper = Keeper::new(installation, reassert, registry, readiness);
    let keeper = keeper.map_err(Error::Thread)?;
    process.spawn(keeper.run(process.drain.clone()));
    Ok(())
}

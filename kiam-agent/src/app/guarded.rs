//! The guard's place in the start: last, once the programs are attached.

use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tracing::{Instrument as _, info_span};

use kiam_core::lifecycle::{Drain, Readiness};
use kiam_kernel::{
    guard::{self, BootGuard, Guard, GuardConfig, GuardError},
    intercept::{Config, HostNetworkPods, Mode, Parts},
};

/// Sets the guard up, and has it kept by a task until the drain.
pub(super) async fn start(
    config: &Config,
    parts: &mut Parts,
    (registry, readiness): (&mut Registry, &Readiness),
    drain: Drain,
    tasks: &mut JoinSet<()>,
) -> Result<(), GuardError> {
    let metrics = guard::Metrics::register(registry);
    let shown = (readiness.detail("guard route"), readiness.latch("older connections ended"));
    let asked = match config.mode {
        Mode::Enforce => config.guard,
        // Nothing changes for the pods.
        Mode::Observe => GuardConfig::default(),
    };
    // On also where programs above the pods' cgroup made it necessary.
    let asked = GuardConfig { skb: parts.guards_packets, ..asked };
    let uplink = parts.uplink.take();
    // Those of hostNetwork pods that pass would hang where packets are guarded, for no connect was noted: ended, they
    // are opened anew.
    let guarded = parts.guards_packets || uplink.is_some();
    let ends_hosts = config.host_network == HostNetworkPods::Intercept || (guarded && parts.first);
    if let (Some(folder), Some(preference)) = (&config.boot_guard, asked.route) {
        let detail = readiness.detail("boot guard");
        let boot = BootGuard::new(folder.clone(), preference, metrics.clone(), detail);
        tasks.spawn(boot.keep(drain.clone()).instrument(info_span!("boot guard")));
    }
    let guard = Guard::start(asked, ends_hosts, &parts.cgroup, uplink, metrics, shown).await?;
    tasks.spawn(guard.keep(drain).instrument(info_span!("guard")));
    Ok(())
}

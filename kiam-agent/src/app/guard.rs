//! The guard's place in the start: last, once the programs are attached.

use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tracing::{Instrument as _, info_span};

use crate::{
    intercept::{Config, Guard, GuardConfig, GuardError, GuardMetrics, Mode, Parts},
    lifecycle::{Drain, Readiness},
};

/// Sets the guard up, and has it kept by a task until the drain.
pub(super) async fn start(
    config: &Config,
    parts: &mut Parts,
    (registry, readiness): (&mut Registry, &Readiness),
    drain: Drain,
    tasks: &mut JoinSet<()>,
) -> Result<(), GuardError> {
    let metrics = GuardMetrics::register(registry);
    let detail = readiness.detail("guard route");
    let asked = match config.mode {
        Mode::Enforce => config.guard,
        // Nothing changes for the pods.
        Mode::Observe => GuardConfig::default(),
    };
    let uplink = parts.uplink.take();
    let (cgroup, host_network) = (&parts.cgroup, config.host_network);
    let guard = Guard::start(asked, host_network, cgroup, uplink, metrics, detail).await?;
    tasks.spawn(guard.keep(drain).instrument(info_span!("guard")));
    Ok(())
}

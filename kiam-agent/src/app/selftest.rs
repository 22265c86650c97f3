//! The self-test's place in the start: once pods are served, and before the agent is ready.

use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tracing::{Instrument as _, info_span};

use kiam_core::lifecycle::{Drain, Readiness};
use kiam_kernel::{
    intercept::{Config, InterceptionParts, Mode},
    selftest::{self, Selftest, SelftestStatus, Witness},
};

/// Starts a task that tests the interception until the drain; the agent is not ready before the first self-test succeeds.
pub(super) fn start(
    config: &Config,
    parts: &InterceptionParts,
    witness: Witness,
    (registry, readiness): (&mut Registry, &Readiness),
    drain: Drain,
    tasks: &mut JoinSet<()>,
) {
    if config.mode == Mode::Observe {
        return;
    }
    let status = SelftestStatus {
        latch: readiness.latch("self-test"),
        detail: readiness.detail("self-test"),
        metrics: selftest::Metrics::register(registry),
    };
    let asked = selftest::Config {
        interval: config.selftest_interval,
        attested: config.attested,
        guarded: parts.guards_packets || config.guard.route.is_some(),
        path: config.path,
    };
    let needs = selftest::SelftestParts {
        cgroup: parts.cgroup.path().to_owned(),
        marks: parts.marks.clone(),
        flows: parts.flows.clone(),
        sandboxes: parts.sandboxes.clone(),
        rewriter: parts.rewriter.clone(),
    };
    let selftest = Selftest::new(asked, needs, witness);
    tasks.spawn(selftest.keep(status, drain).instrument(info_span!("selftest")));
}

//! The guard's metrics.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

use super::probe::Reach;
use kiam_core::telemetry::{ByLabel, register};

/// The metrics of what the guard did, and whether it holds.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub(super) restored: Counter,
    pub(super) destroyed: Counter,
    pub(super) uplinks: Gauge,
    boot: ByLabel<&'static str, Gauge>,
    route: ByLabel<&'static str, Gauge>,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        Self {
            restored: register(
                registry,
                "kiam_guard_restored",
                "Routing rules of the guard, and programs at uplinks, that were removed and that the agent restored",
            ),
            destroyed: register(
                registry,
                "kiam_guard_sockets_destroyed",
                "Pods' connections to the IMDS, older than the agent, that the agent ended",
            ),
            uplinks: register(
                registry,
                "kiam_guard_uplinks",
                "Interfaces at whose egress the guard drops pods' packets for the IMDS",
            ),
            boot: ByLabel::register(
                registry,
                "kiam_guard_boot",
                "Whether the node sets the routing rules before its kubelet starts, by state; absent without --boot-guard",
                "state",
            ),
            route: ByLabel::register(
                registry,
                "kiam_guard_route",
                "Whether the routing rules block pods from the IMDS, as tested from a pod, by state",
                "state",
            ),
        }
    }

    /// Sets the boot guard's state to 1, and the other to 0.
    pub(super) fn set_boot(&self, installed: bool) {
        for (state, holds) in [("installed", installed), ("failed", !installed)] {
            self.boot.of(state).set(i64::from(holds));
        }
    }

    /// Sets `reach` to 1, and the others to 0.
    pub(super) fn set_route(&self, reach: Reach) {
        for state in Reach::ALL {
            self.route.of(state.name()).set(i64::from(state == reach));
        }
    }
}

//! What the accept loops count.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::pods::Unattested;

/// Whose a connection was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Identity {
    Attested,
    NoEntry,
    NotAPod,
    CgroupGone,
    OtherPod,
    Contested,
    Proof,
    Unreadable,
    Unknown,
    OverLimit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    identity: Identity,
}

/// How a connection that was passed on ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Relayed {
    Closed,
    Broken,
    Idle,
    Overtime,
    Drained,
    Unreachable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RelayLabels {
    outcome: Relayed,
}

/// The accept loops' metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    connections: Family<Labels, Counter>,
    relays: Family<RelayLabels, Counter>,
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_serve_connections",
            "Connections to the agent, by what is known of the other end",
            metrics.connections.clone(),
        );
        registry.register(
            "kiam_serve_relays",
            "Connections of --node-role pods that were passed on to the real service, by how they ended",
            metrics.relays.clone(),
        );
        metrics
    }

    pub(super) fn accepted(&self, error: Option<&Unattested>) {
        self.count(match error {
            None => Identity::Attested,
            Some(Unattested::NoEntry) => Identity::NoEntry,
            Some(Unattested::NotAPod(_)) => Identity::NotAPod,
            Some(Unattested::Gone(_)) => Identity::CgroupGone,
            Some(Unattested::OtherPod { .. }) => Identity::OtherPod,
            Some(Unattested::Contested(_)) => Identity::Contested,
            Some(Unattested::Proof) => Identity::Proof,
            Some(Unattested::Unreadable(_)) => Identity::Unreadable,
            Some(Unattested::Unknown { .. }) => Identity::Unknown,
        });
    }

    pub(super) fn refused(&self) {
        self.count(Identity::OverLimit);
    }

    pub(super) fn relayed(&self, outcome: Relayed) {
        self.relays.get_or_create(&RelayLabels { outcome }).inc();
    }

    fn count(&self, identity: Identity) {
        self.connections.get_or_create(&Labels { identity }).inc();
    }
}

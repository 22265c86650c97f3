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
    Proof,
    Unreadable,
    OverLimit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    identity: Identity,
}

/// The accept loops' metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Family<Labels, Counter>);

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_serve_connections",
            "Connections to the agent, by what is known of the other end",
            metrics.0.clone(),
        );
        metrics
    }

    pub(super) fn accepted(&self, error: Option<&Unattested>) {
        self.count(match error {
            None => Identity::Attested,
            Some(Unattested::NoEntry) => Identity::NoEntry,
            Some(Unattested::NotAPod(_)) => Identity::NotAPod,
            Some(Unattested::Gone(_)) => Identity::CgroupGone,
            Some(Unattested::Proof) => Identity::Proof,
            Some(Unattested::Unreadable(_)) => Identity::Unreadable,
        });
    }

    pub(super) fn refused(&self) {
        self.count(Identity::OverLimit);
    }

    fn count(&self, identity: Identity) {
        self.0.get_or_create(&Labels { identity }).inc();
    }
}

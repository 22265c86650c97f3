//! The metrics of the accept loops.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::limits::ExceededLimit;
use kiam_core::pods::Unattested;

/// The identity of a connection's caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Identity {
    Attested,
    NoEntry,
    NotAPod,
    CgroupGone,
    OtherPod,
    Contested,
    Selftest,
    Unreadable,
    Unknown,
    OverLimit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    identity: Identity,
}

/// The end of a connection that was passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum RelayOutcome {
    Closed,
    Broken,
    Idle,
    Overtime,
    Drained,
    Unreachable,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RelayLabels {
    outcome: RelayOutcome,
}

/// A connection or request that exceeded a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum Rejection {
    /// A request, which was answered with 503.
    Requests,
    /// A connection, because its owner opens them too fast.
    NewConnections,
    /// A connection, because its owner has too many busy ones.
    OpenConnections,
    /// An idle connection, which was ended for a new one of its owner.
    IdleConnections,
    /// A connection, because there are too many on the node.
    Node,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RejectionLabels {
    reason: Rejection,
}

/// The accept loops' metrics.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    connections: Family<Labels, Counter>,
    relays: Family<RelayLabels, Counter>,
    rejected: Family<RejectionLabels, Counter>,
}

// === impl Rejection ===

impl Rejection {
    /// The message for the log.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Requests => "Too many requests; answered with 503",
            Self::NewConnections => "Too many new connections; closed",
            Self::OpenConnections => "Too many connections; closed",
            Self::IdleConnections => "Too many connections; closed the longest idle one",
            Self::Node => "Too many connections on the node; closed",
        }
    }
}

impl From<ExceededLimit> for Rejection {
    fn from(limit: ExceededLimit) -> Self {
        match limit {
            ExceededLimit::All | ExceededLimit::Owners => Self::Node,
            ExceededLimit::Open => Self::OpenConnections,
            ExceededLimit::Rate => Self::NewConnections,
        }
    }
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_serve_connections",
            "Connections to the agent, by identity of the caller",
            metrics.connections.clone(),
        );
        registry.register(
            "kiam_serve_relays",
            "Connections of --node-role pods that were passed on to the real service, by outcome",
            metrics.relays.clone(),
        );
        registry.register(
            "kiam_serve_rejected",
            "Connections and requests beyond a limit, by the limit",
            metrics.rejected.clone(),
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
            Some(Unattested::Selftest) => Identity::Selftest,
            Some(Unattested::Unreadable(_)) => Identity::Unreadable,
            Some(Unattested::Unknown { .. }) => Identity::Unknown,
        });
    }

    pub(super) fn over_limit(&self) {
        self.count(Identity::OverLimit);
    }

    pub(super) fn rejected(&self, reason: Rejection) {
        self.rejected.get_or_create(&RejectionLabels { reason }).inc();
    }

    pub(super) fn relayed(&self, outcome: RelayOutcome) {
        self.relays.get_or_create(&RelayLabels { outcome }).inc();
    }

    fn count(&self, identity: Identity) {
        self.connections.get_or_create(&Labels { identity }).inc();
    }
}

//! The metrics of the accept loops.

use prometheus_client::{
    encoding::EncodeLabelValue, metrics::counter::Counter, registry::Registry,
};

use super::limits::ExceededLimit;
use kiam_core::{pods::Unattested, telemetry::ByLabel};

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

/// The accept loops' metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    connections: ByLabel<Identity, Counter>,
    relays: ByLabel<RelayOutcome, Counter>,
    rejected: ByLabel<Rejection, Counter>,
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
        let metrics = Self {
            connections: ByLabel::register(
                registry,
                "kiam_serve_connections",
                "Connections to the agent, by identity of the caller",
                "identity",
            ),
            relays: ByLabel::register(
                registry,
                "kiam_serve_relays",
                "Connections of --node-role pods that were passed on to the real service, by outcome",
                "outcome",
            ),
            rejected: ByLabel::register(
                registry,
                "kiam_serve_rejected",
                "Connections and requests beyond a limit, by the limit",
                "reason",
            ),
        };
        metrics.rejected.show([Rejection::Node]);
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
        self.rejected.of(reason).inc();
    }

    pub(super) fn relayed(&self, outcome: RelayOutcome) {
        self.relays.of(outcome).inc();
    }

    fn count(&self, identity: Identity) {
        self.connections.of(identity).inc();
    }
}

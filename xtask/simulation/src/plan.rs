//! What is to happen to the fleet.

use std::{ops::Range, time::Duration};

/// How pods come and go. Each is followed at once by another on its node, of a random role of that node's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Churn {
    /// Mean life of a pod, exponentially distributed.
    pub(crate) life: Duration,
    /// Share of all pods that an hourly rollout replaces.
    pub(crate) rollout: f64,
    /// How long that takes.
    pub(crate) rollout_takes: Duration,
}

/// What is held when the simulation begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Everything, of any age.
    Steady,
    /// Nothing. Each agent starts at a random time within the first of these, and its pods come within the second.
    Cold(Duration, Duration),
}

/// A DaemonSet's rollout.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rolling {
    /// Nodes at a time.
    pub(crate) surge: u32,
    /// Whether the new agent is given what the old one holds.
    pub(crate) warm: bool,
}

/// What happens to the fleet.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) start: Start,
    pub(crate) churn: Option<Churn>,
    pub(crate) rolling: Option<Rolling>,
    /// When STS does not answer.
    pub(crate) outage: Range<Duration>,
    pub(crate) until: Duration,
}

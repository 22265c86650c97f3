//! What is simulated: how many nodes and pods, and which of them share a session.

use std::time::Duration;

use kiam_core::{
    credentials::{Config, schedule},
    rate::Rate,
};

/// Service accounts that use one role.
const ACCOUNTS_A_ROLE: u32 = 2;

/// The cluster.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fleet {
    pub(crate) nodes: u32,
    /// A node.
    pub(crate) pods: u32,
    /// A node.
    pub(crate) roles: u32,
    /// Calls a second that the account's STS answers.
    pub(crate) quota: u32,
    /// What a node may ask.
    pub(crate) sts_rate: Rate,
}

/// Which pods of a node share a session, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SessionName {
    /// Those of a role: the name is the same for all.
    Role,
    /// Those of a service account.
    ServiceAccount,
    /// None: the pod's name is in it.
    Pod,
}

/// What decides how many sessions there are, and how long each lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    pub(crate) name: SessionName,
    pub(crate) duration: Duration,
    /// Whether the pods' roles are assumed from another one, which each node keeps a session of.
    pub(crate) chained: bool,
}

// === impl Fleet ===

impl Fleet {
    /// `nodes` of 100 pods and 20 roles, with the agent's defaults and the quota that AWS documents.
    pub(crate) fn of(nodes: u32) -> Self {
        Self { nodes, pods: 100, roles: 20, quota: 600, sts_rate: Config::default().sts_rate }
    }

    /// Sessions that pods of one node may want; [`Policy::chained`] adds one.
    pub(crate) fn pods_sessions(&self, name: SessionName) -> u32 {
        match name {
            SessionName::Role => self.roles,
            SessionName::ServiceAccount => self.roles * ACCOUNTS_A_ROLE,
            SessionName::Pod => self.pods,
        }
    }

    /// All that one node may hold.
    pub(crate) fn sessions(&self, policy: &Policy) -> u32 {
        self.pods_sessions(policy.name) + u32::from(policy.chained)
    }

    /// The account's quota as a bucket: a second's calls at once, and refilled evenly.
    pub(crate) fn account_rate(&self) -> Rate {
        Rate { burst: self.quota, period: Duration::from_secs(1) / self.quota }
    }
}

// === impl Policy ===

impl Policy {
    pub(crate) fn new(name: SessionName, duration: Duration) -> Self {
        Self { name, duration, chained: false }
    }

    /// How long after it was issued a session is renewed.
    pub(crate) fn renewal(&self) -> Duration {
        schedule::refresh_after(self.duration, fastrand::f64())
    }
}

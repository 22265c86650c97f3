//! The kinds of records.

/// A kind of record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// `/api/v1/pods`.
    Pods,
    /// `/api/v1/namespaces`.
    Namespaces,
    /// `/api/v1/serviceaccounts`.
    ServiceAccounts,
    /// `/apis/events.k8s.io/v1/events`.
    Events,
    /// `/api/v1/nodes`.
    Nodes,
}

// === impl Resource ===

impl Resource {
    pub(super) const ALL: [Self; 5] =
        [Self::Pods, Self::Namespaces, Self::ServiceAccounts, Self::Events, Self::Nodes];

    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Namespaces => "namespaces",
            Self::ServiceAccounts => "serviceaccounts",
            Self::Events => "events",
            Self::Nodes => "nodes",
        }
    }

    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::Pods => "Pod",
            Self::Namespaces => "Namespace",
            Self::ServiceAccounts => "ServiceAccount",
            Self::Events => "Event",
            Self::Nodes => "Node",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Self::Events => "events.k8s.io/v1",
            _ => "v1",
        }
    }

    pub(super) fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespaces | Self::Nodes)
    }
}

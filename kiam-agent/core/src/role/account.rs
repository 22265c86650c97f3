//! The Kubernetes account whose tokens vouch for a pod.

use std::{fmt, sync::Arc};

/// The name of a Kubernetes ServiceAccount. `Display` is how `kubectl` writes it: `<namespace>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AccountName {
    /// The namespace's name.
    pub namespace: Arc<str>,
    /// The account's own name.
    pub name: Arc<str>,
}

/// The proof of identity that STS gets for a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A signature with the node's credentials: `AssumeRole`.
    Node,
    /// A token of the pod's own ServiceAccount: `AssumeRoleWithWebIdentity`.
    WebIdentity,
}

// === impl AccountName ===

impl AccountName {
    /// The account `name` of `namespace`.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for AccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

//! What is wanted, and by whom.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::RoleIdentity;

/// A pod that wants an identity, as far as it counts for sharing calls to STS among pods.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claimant {
    /// Its namespace's name.
    pub namespace: Arc<str>,
    /// Its UID: a pod of the same name that comes later is another one.
    pub pod: Arc<str>,
}

/// The identities that the node's pods are allowed and want, with the pods that want each; level-triggered.
pub type WantedRoles = Arc<BTreeMap<RoleIdentity, BTreeSet<Claimant>>>;

// === impl Claimant ===

impl Claimant {
    /// The pod with this UID.
    #[must_use]
    pub fn new(namespace: &str, pod: &str) -> Self {
        Self { namespace: namespace.into(), pod: pod.into() }
    }
}

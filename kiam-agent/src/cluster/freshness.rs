//! The age that a list may have, and the proof that it is current.
//!
//! An API server without etcd continues to answer from its cache: lists of any age, watches that stay open, and
//! bookmarks with the same version. Only a read without a version is answered from etcd, or confirmed with it. Such a
//! list of this node's pods would be expensive: servers before 1.31 read all pods for it. So one object of a kind with
//! few objects is read, whose list has etcd's current version. The list of pods that is not older comes from the cache,
//! once that has caught up.
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-get-and-list>

use kube::api::{ListParams, VersionMatch};

/// The age that a list may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// From the API server's cache, of any age, without a proof.
    Any,
    /// From the cache, of this version or a newer one.
    NotOlderThan(String),
    /// From etcd.
    MostRecent,
}

// === impl Freshness ===

impl Freshness {
    /// Whether such a list proves that etcd answers.
    pub(super) fn is_proof(&self) -> bool {
        *self != Self::Any
    }

    /// The parameters of such a list.
    pub(super) fn of(&self, params: ListParams) -> ListParams {
        match self {
            Self::Any => params.match_any(),
            Self::NotOlderThan(version) => params.at(version).matching(VersionMatch::NotOlderThan),
            Self::MostRecent => params,
        }
    }
}

/// The parameters of a list of one object, from etcd.
pub(super) fn one() -> ListParams {
    ListParams::default().limit(1)
}

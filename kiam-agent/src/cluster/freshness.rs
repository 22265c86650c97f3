//! How old a list may be, and what proves that one is not.
//!
//! An API server that is cut off from etcd goes on to answer from its cache: lists of any age, watches that stay open,
//! and bookmarks that name the same version again and again. Only a read that names no version is answered from etcd,
//! or confirmed with it. One of this node's pods would be dear: servers before 1.31 read all pods for it. So one
//! object is read of a kind that there is little of, and its list names the version that etcd has now; a list of pods
//! that is not older comes from the cache again, once that has caught up.
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#semantics-for-get-and-list>

use kube::api::{ListParams, VersionMatch};

/// How old a list may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// From the API server's cache, however far behind: costs nothing, and proves nothing.
    Any,
    /// From the cache, once it is at this version.
    NotOlderThan(String),
    /// What etcd has now.
    MostRecent,
}

// === impl Freshness ===

impl Freshness {
    /// Whether such a list is a sign of life of etcd.
    pub(super) fn is_proof(&self) -> bool {
        *self != Self::Any
    }

    /// Asks for such a list.
    pub(super) fn of(&self, params: ListParams) -> ListParams {
        match self {
            Self::Any => params.match_any(),
            Self::NotOlderThan(version) => params.at(version).matching(VersionMatch::NotOlderThan),
            Self::MostRecent => params,
        }
    }
}

/// One object, of what etcd has now.
pub(super) fn one() -> ListParams {
    ListParams::default().limit(1)
}

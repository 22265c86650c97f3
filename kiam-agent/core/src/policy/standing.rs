//! The decision about each pod, made when one of the records that it depends on changes, and not at every request.
//!
//! A decision is kept with the records that it was made from, and counts while these are the current ones. So nothing has
//! to find out which decisions a change concerns, and none can be missed.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Decision;
use crate::{
    maps::RequestMap,
    pods::{Namespace, Pod, PodUid, ServiceAccount},
};

/// The decision about a pod, with the records that it was made from.
#[derive(Debug)]
pub struct Standing {
    decision: Decision,
    grounds: Grounds,
}

/// The records that a decision depends on.
#[derive(Clone, Debug)]
pub(super) struct Grounds {
    pub(super) pod: Arc<Pod>,
    pub(super) namespace: Option<Arc<Namespace>>,
    /// The pod's ServiceAccount, where that may name the role.
    pub(super) account: Option<Arc<ServiceAccount>>,
}

/// The decisions about the known pods.
#[derive(Debug, Default)]
pub(super) struct Standings(RwLock<RequestMap<PodUid, Arc<Standing>>>);

// === impl Standing ===

impl Standing {
    pub(super) fn new(decision: Decision, grounds: Grounds) -> Self {
        Self { decision, grounds }
    }

    /// The decision.
    #[must_use]
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// The pod.
    #[must_use]
    pub fn pod(&self) -> &Pod {
        &self.grounds.pod
    }

    /// The pod's namespace, if it is known.
    #[must_use]
    pub fn namespace(&self) -> Option<&Namespace> {
        self.grounds.namespace.as_deref()
    }
}

// === impl Grounds ===

impl Grounds {
    /// Whether these are the same records. A record that changes is another one at another address, and one that is kept
    /// here keeps its address.
    fn are(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pod, &other.pod)
            && same(self.namespace.as_ref(), other.namespace.as_ref())
            && same(self.account.as_ref(), other.account.as_ref())
    }
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

// === impl Standings ===

impl Standings {
    /// The decision that was made from these records, if it is kept.
    pub(super) fn get(&self, grounds: &Grounds) -> Option<Arc<Standing>> {
        let kept = self.read();
        kept.get(&grounds.pod.uid).filter(|standing| standing.grounds.are(grounds)).cloned()
    }

    /// Keeps a decision, in place of the pod's last one.
    pub(super) fn keep(&self, standing: &Arc<Standing>) {
        self.write().insert(standing.grounds.pod.uid.clone(), standing.clone());
    }

    /// Forgets the decision about a pod that is gone.
    pub(super) fn forget(&self, uid: &PodUid) {
        self.write().remove(uid);
    }

    /// Forgets the decisions about pods that `lives` does not name.
    pub(super) fn retain(&self, lives: impl Fn(&PodUid) -> bool) {
        self.write().retain(|uid, _| lives(uid));
    }

    fn read(&self) -> RwLockReadGuard<'_, RequestMap<PodUid, Arc<Standing>>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, RequestMap<PodUid, Arc<Standing>>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Standings {
    pub(super) fn len(&self) -> usize {
        self.read().len()
    }

    pub(super) fn all(&self) -> RequestMap<PodUid, Arc<Standing>> {
        self.read().clone()
    }
}

//! The read side: the states of pods.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use super::{NoListenerReason, State};
use kiam_core::pods::{Pod, PodNamespace, PodNamespaces, PodUid};

/// A reader of the states of pods. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct SandboxReader(Arc<RwLock<HashMap<PodUid, SandboxEntry>>>);

/// The state of one pod, with its namespaces.
#[derive(Clone, Debug)]
struct SandboxEntry {
    state: State,
    /// The cookies of the pod's network namespaces.
    namespaces: Vec<u64>,
    /// Whether the pod's addresses are known.
    has_address: bool,
}

// === impl SandboxReader ===

impl SandboxReader {
    /// The state of `pod`; `None` while it has no cgroup. Static pods' cgroups are named by the config hash.
    #[must_use]
    pub fn of(&self, pod: &Pod) -> Option<State> {
        let own = self.state(&pod.uid);
        own.or_else(|| pod.config_hash.as_ref().and_then(|hash| self.state(hash)))
    }

    /// The state of the pod whose cgroup is named by `uid`.
    #[must_use]
    pub fn state(&self, uid: &PodUid) -> Option<State> {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pods.get(uid).map(|standing| standing.state.clone())
    }

    /// The number of pods in each state, by [`State::name`].
    #[must_use]
    pub fn counts(&self) -> HashMap<&'static str, u64> {
        let mut counts: HashMap<_, _> = State::NAMES.iter().map(|name| (*name, 0)).collect();
        for standing in self.0.read().unwrap_or_else(PoisonError::into_inner).values() {
            *counts.entry(standing.state.name()).or_default() += 1;
        }
        counts
    }

    pub(super) fn set(&self, uid: &PodUid, state: State) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let standing = pods.entry(uid.clone()).or_default();
        if standing.state != state {
            tracing::debug!(pod.uid = %uid, %state, "Sandbox scanned");
            standing.state = state;
        }
    }

    /// Sets the pod's `namespaces`, by cookie, and whether its addresses are known.
    pub(super) fn set_namespaces(&self, uid: &PodUid, namespaces: &[u64], has_address: bool) {
        let mut pods = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let standing = pods.entry(uid.clone()).or_default();
        standing.namespaces = namespaces.to_vec();
        standing.has_address = has_address;
    }

    pub(super) fn remove(&self, uid: &PodUid) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

impl PodNamespaces for SandboxReader {
    fn of_pod(&self, pod: &Pod) -> Vec<PodNamespace> {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let names = std::iter::once(&pod.uid).chain(&pod.config_hash);
        names
            .filter_map(|uid| Some((uid, pods.get(uid)?)))
            .flat_map(SandboxEntry::namespaces)
            .collect()
    }

    fn without_address(&self) -> Vec<PodNamespace> {
        let pods = self.0.read().unwrap_or_else(PoisonError::into_inner);
        pods.iter().filter(|(_, pod)| !pod.has_address).flat_map(SandboxEntry::namespaces).collect()
    }
}

// === impl SandboxEntry ===

impl SandboxEntry {
    fn namespaces((uid, own): (&PodUid, &Self)) -> Vec<PodNamespace> {
        let of = |netns: &u64| PodNamespace { uid: uid.clone(), netns: *netns };
        own.namespaces.iter().map(of).collect()
    }
}

impl Default for SandboxEntry {
    fn default() -> Self {
        let state = State::Without(NoListenerReason::NoProcess);
        Self { state, namespaces: Vec::new(), has_address: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandboxes::NoListenerReason;
    use kiam_core::pods::fixtures::{config_hash, uid};

    #[test]
    fn a_static_pods_state_is_that_of_its_config_hash_unless_its_uid_has_one() {
        let reader = SandboxReader::default();
        let mirror = Pod::test(1).mirroring("kube-system", config_hash(7));
        assert_eq!(reader.of(&mirror), None);
        let ready = State::Ready { netns: 7, port: 61000 };
        reader.set(&config_hash(7), ready.clone());
        assert_eq!(reader.of(&mirror), Some(ready));
        assert_eq!(reader.of(&Pod::test(2)), None);
        let without = State::Without(NoListenerReason::NoProcess);
        reader.set(&uid(1), without.clone());
        assert_eq!(reader.of(&mirror), Some(without));
        let counts = reader.counts();
        assert_eq!((counts["ready"], counts["no_process"], counts["failed"]), (1, 1, 0));
        assert_eq!(counts.len(), State::NAMES.len());
    }
}

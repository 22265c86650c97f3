//! The read side: where does a pod stand?

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use super::State;
use crate::pods::{Pod, PodUid};

/// Tells where each pod stands. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct SandboxReader(Arc<RwLock<HashMap<PodUid, State>>>);

// === impl SandboxReader ===

impl SandboxReader {
    /// Where `pod` stands; `None` while it has no cgroup. Static pods' cgroups are named by the config hash.
    #[must_use]
    pub fn of(&self, pod: &Pod) -> Option<State> {
        let own = self.state(&pod.uid);
        own.or_else(|| pod.config_hash.as_ref().and_then(|hash| self.state(hash)))
    }

    /// Where the pod whose cgroup is named by `uid` stands.
    #[must_use]
    pub fn state(&self, uid: &PodUid) -> Option<State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    /// How many pods there are in each state, by [`State::name`].
    #[must_use]
    pub fn counts(&self) -> HashMap<&'static str, u64> {
        let mut counts: HashMap<_, _> = State::NAMES.iter().map(|name| (*name, 0)).collect();
        for state in self.0.read().unwrap_or_else(PoisonError::into_inner).values() {
            *counts.entry(state.name()).or_default() += 1;
        }
        counts
    }

    pub(super) fn set(&self, uid: &PodUid, state: State) {
        let mut states = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if states.get(uid) != Some(&state) {
            tracing::debug!(pod.uid = %uid, %state, "Sandbox seen");
            states.insert(uid.clone(), state);
        }
    }

    pub(super) fn remove(&self, uid: &PodUid) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pods::fixtures::{config_hash, uid},
        sandboxes::Reason,
    };

    #[test]
    fn a_static_pods_state_is_that_of_its_config_hash_unless_its_uid_has_one() {
        let reader = SandboxReader::default();
        let mirror = Pod::test(1).mirroring("kube-system", config_hash(7));
        assert_eq!(reader.of(&mirror), None);
        let ready = State::Ready { netns: 7, port: 61000 };
        reader.set(&config_hash(7), ready.clone());
        assert_eq!(reader.of(&mirror), Some(ready));
        assert_eq!(reader.of(&Pod::test(2)), None);
        let without = State::Without(Reason::NoProcess);
        reader.set(&uid(1), without.clone());
        assert_eq!(reader.of(&mirror), Some(without));
        let counts = reader.counts();
        assert_eq!((counts["ready"], counts["no_process"], counts["failed"]), (1, 1, 0));
        assert_eq!(counts.len(), State::NAMES.len());
    }
}

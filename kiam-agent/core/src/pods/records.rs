//! The newest known version of each object, whatever the order in which events and lists arrive.
//!
//! Lists are answered from an API server's cache (`resourceVersion=0`), which may lag behind the watch, and another
//! server's may lag further. So every record carries its version and nothing older replaces it: neither an event, nor a
//! list with an older version, nor a list that was made before the object was created. Versions are compared as
//! numbers, which Kubernetes promises for its own types
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions>). Where a version is not a number,
//! the last arrival wins.

use std::{borrow::Borrow, collections::HashMap, hash::Hash, sync::Arc};

use crate::maps::RequestMap;

/// `metadata.resourceVersion` when it is a number.
pub(super) type Version = Option<u64>;

/// The number of deleted objects that are remembered one by one. A tenant that creates and deletes objects all the time
/// must not fill the agent's memory until the next list, which may be an hour away.
const MOST_GONE: usize = 4096;

/// The newest known version of each object of one kind.
#[derive(Debug)]
pub struct Records<K, V> {
    known: RequestMap<K, Record<V>>,
    /// Objects deleted since the newest list, with the version of their deletion. An older list or a replayed event must
    /// not bring them back.
    gone: HashMap<K, Version>,
    /// The newest deletion that is no longer among `gone`. An unknown object that is no newer counts as deleted, unless a
    /// later list shows it.
    settled: Version,
    /// The version of the newest list: an object that it lacks did not exist at that version.
    listed: Version,
    /// The newest version of anything seen.
    newest: Version,
}

#[derive(Debug)]
struct Record<V> {
    version: Version,
    value: Arc<V>,
}

/// One record's change: the values before and after.
#[derive(Debug)]
pub struct Change<V> {
    pub(super) before: Option<Arc<V>>,
    pub(super) after: Option<Arc<V>>,
}

/// Whether `version` is no newer than `than`; `false` when they can't be compared.
fn no_newer(version: Version, than: Version) -> bool {
    matches!((version, than), (Some(version), Some(than)) if version <= than)
}

/// Whether `version` is certainly newer than `than`.
fn newer(version: Version, than: Version) -> bool {
    matches!((version, than), (Some(version), Some(than)) if version > than)
}

// === impl Records ===

impl<K, V> Default for Records<K, V> {
    fn default() -> Self {
        let (known, gone) = (RequestMap::default(), HashMap::new());
        Self { known, gone, settled: None, listed: None, newest: None }
    }
}

impl<K: Clone + Eq + Hash, V: PartialEq> Records<K, V> {
    pub(super) fn get<Q>(&self, key: &Q) -> Option<&Arc<V>>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        self.known.get(key).map(|record| &record.value)
    }

    pub(super) fn values(&self) -> impl ExactSizeIterator<Item = &Arc<V>> {
        self.known.values().map(|record| &record.value)
    }

    pub(super) fn newest(&self) -> Version {
        self.newest
    }

    /// Applies an event that shows an object; `None` when nothing changes.
    pub(super) fn apply(&mut self, key: K, version: Version, value: V) -> Option<Change<V>> {
        self.newest = self.newest.max(version);
        self.take(key, version, value, self.listed.max(self.settled))
    }

    /// Applies an object's deletion, at `version` if that is known.
    pub(super) fn delete(&mut self, key: &K, version: Version) -> Option<Change<V>> {
        self.newest = self.newest.max(version);
        if no_newer(version, self.listed) && !self.known.contains_key(key) {
            return None;
        }
        let known = self.known.get(key).map(|record| record.version);
        let gone = self.gone.get(key).copied();
        if known.or(gone).is_some_and(|seen| newer(seen, version)) {
            return None;
        }
        if self.gone.len() >= MOST_GONE {
            self.settled =
                self.gone.drain().map(|(_, version)| version).fold(self.settled, Version::max);
        }
        self.gone.insert(key.clone(), version);
        let before = self.known.remove(key)?.value;
        Some(Change { before: Some(before), after: None })
    }

    /// Applies a whole list made at `version`. Records that it lacks are dropped, unless newer than the list.
    pub(super) fn reset(
        &mut self,
        list: impl IntoIterator<Item = (K, Version, V)>,
        version: Version,
    ) -> Vec<Change<V>> {
        let mut listed_before = self.listed;
        if no_newer(version, self.settled) {
            listed_before = listed_before.max(self.settled);
        }
        let mut changes = Vec::new();
        let mut present = std::collections::HashSet::new();
        for (key, item_version, value) in list {
            present.insert(key.clone());
            self.newest = self.newest.max(item_version);
            changes.extend(self.take(key, item_version, value, listed_before));
        }
        self.known.retain(|key, record| {
            let keep = present.contains(key) || newer(record.version, version);
            if !keep {
                changes.push(Change { before: Some(Arc::clone(&record.value)), after: None });
            }
            keep
        });
        self.listed = self.listed.max(version);
        self.newest = self.newest.max(version);
        let listed = self.listed;
        self.gone.retain(|key, gone| match (*gone, listed) {
            (Some(_), Some(_)) => newer(*gone, listed),
            _ => present.contains(key),
        });
        changes
    }

    /// Forgets all versions, so that the next list replaces everything: the server's history went back (etcd was
    /// restored from a backup), and its records now have lower versions but are newer.
    pub(super) fn rewind(&mut self) {
        self.gone.clear();
        self.settled = None;
        self.listed = None;
        self.newest = None;
        for record in self.known.values_mut() {
            record.version = None;
        }
    }

    fn take(&mut self, key: K, version: Version, value: V, listed: Version) -> Option<Change<V>> {
        match self.known.get_mut(&key) {
            Some(record) => {
                if newer(record.version, version) {
                    return None;
                }
                record.version = version;
                if *record.value == value {
                    return None;
                }
                let after = Arc::new(value);
                let before = std::mem::replace(&mut record.value, Arc::clone(&after));
                Some(Change { before: Some(before), after: Some(after) })
            }
            None => {
                let went = self.gone.get(&key).is_some_and(|gone| no_newer(version, *gone));
                if went || no_newer(version, listed) {
                    return None;
                }
                self.gone.remove(&key);
                let after = Arc::new(value);
                self.known.insert(key, Record { version, value: Arc::clone(&after) });
                Some(Change { before: None, after: Some(after) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    type Key = u8;

    /// An API server's whole history, version by version: what became of which object.
    struct History(Vec<(Key, Option<u64>)>);

    impl History {
        /// Objects come, change and go; a key may come again, as a namespace's name does.
        fn random(rng: &mut fastrand::Rng) -> Self {
            Self(
                (1..=rng.u64(10..60))
                    .map(|version| (rng.u8(0..6), rng.u8(0..3).ne(&0).then_some(version)))
                    .collect(),
            )
        }

        /// The object's state at `version`: when it was last written, if it was there.
        fn at(&self, key: Key, version: u64) -> Option<u64> {
            let seen = &self.0[..usize::try_from(version).unwrap()];
            seen.iter().rev().find(|(it, _)| *it == key).and_then(|(_, state)| *state)
        }

        fn list(&self, version: u64) -> BTreeMap<Key, u64> {
            (0..6).filter_map(|key| Some((key, self.at(key, version)?))).collect()
        }

        fn last(&self) -> u64 {
            self.0.len() as u64
        }
    }

    fn held(records: &Records<Key, u64>) -> BTreeMap<Key, u64> {
        (0..6).filter_map(|key| Some((key, **records.get(&key)?))).collect()
    }

    fn event(records: &mut Records<Key, u64>, history: &History, version: u64) {
        let (key, state) = history.0[usize::try_from(version - 1).unwrap()];
        match state {
            Some(_) => records.apply(key, Some(version), version),
            None => records.delete(&key, Some(version)),
        };
    }

    fn reset(records: &mut Records<Key, u64>, list: BTreeMap<Key, u64>, version: u64) {
        records.reset(list.into_iter().map(|(key, it)| (key, Some(it), it)), Some(version));
    }

    #[test]
    fn each_object_is_as_the_newest_thing_seen_of_it_in_any_order_of_events_and_lists() {
        for seed in 0..2000 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let history = History::random(&mut rng);
            let mut records = Records::default();
            // The naive model: up to which version each object's history has been seen.
            let mut seen = [0_u64; 6];
            for _ in 0..rng.u32(1..40) {
                let version = rng.u64(1..=history.last());
                if rng.u8(0..4) == 0 {
                    reset(&mut records, history.list(version), version);
                    seen.iter_mut().for_each(|seen| *seen = (*seen).max(version));
                } else {
                    // A run of events, as of a watch that was opened there, perhaps not for the first time.
                    for version in version..=history.last().min(version + rng.u64(0..5)) {
                        event(&mut records, &history, version);
                        let (key, _) = history.0[usize::try_from(version - 1).unwrap()];
                        let seen = &mut seen[usize::from(key)];
                        *seen = (*seen).max(version);
                    }
                }
                let expected: BTreeMap<Key, u64> = (0..6)
                    .filter_map(|key| Some((key, history.at(key, seen[usize::from(key)])?)))
                    .collect();
                assert_eq!(held(&records), expected, "seed {seed}");
            }
            reset(&mut records, history.list(history.last()), history.last());
            assert_eq!(held(&records), history.list(history.last()), "seed {seed}");
            assert!(records.gone.is_empty(), "seed {seed}: a list of everything settles it");
        }
    }

    #[test]
    fn versions_that_are_no_numbers_hold_in_order_of_arrival() {
        let mut records = Records::default();
        records.reset([(1, None, "a"), (2, None, "b")], None);
        records.apply(1, None, "c");
        records.delete(&2, None);
        assert_eq!(records.get(&1).map(|it| **it), Some("c"));
        assert!(records.get(&2).is_none());
        records.reset([(2, None, "d")], None);
        assert!(records.get(&1).is_none());
        assert_eq!(records.get(&2).map(|it| **it), Some("d"));
    }

    #[test]
    fn after_a_rewind_lower_versions_hold() {
        let mut records = Records::default();
        records.reset([(1, Some(900), "old"), (2, Some(901), "gone")], Some(1000));
        records.delete(&3, Some(1001));
        records.reset([(1, Some(500), "new"), (3, Some(501), "back")], Some(600));
        assert_eq!(records.get(&1).map(|it| **it), Some("old"), "a lagging list changes nothing");
        records.rewind();
        records.reset([(1, Some(500), "new"), (3, Some(501), "back")], Some(600));
        assert_eq!(records.get(&1).map(|it| **it), Some("new"));
        assert!(records.get(&2).is_none());
        assert_eq!(records.get(&3).map(|it| **it), Some("back"));
        assert_eq!(records.newest(), Some(600));
    }

    #[test]
    fn what_is_the_same_is_no_change() {
        let mut records = Records::default();
        assert!(records.apply(1, Some(5), "a").is_some());
        assert!(records.apply(1, Some(6), "a").is_none());
        assert!(records.reset([(1, Some(6), "a")], Some(9)).is_empty());
        assert!(records.delete(&2, Some(10)).is_none());
    }

    #[test]
    fn however_many_come_and_go_few_are_remembered_and_none_comes_back() {
        let mut records = Records::default();
        records.reset([(0, Some(1), "stays")], Some(1));
        for key in 1..20_000 {
            records.apply(key, Some(10 * key), "x");
            records.delete(&key, Some(10 * key + 1));
            assert!(records.gone.len() <= MOST_GONE);
        }
        // Replayed, and in a list that was under way.
        records.apply(5, Some(50), "x");
        records.reset([(0, Some(1), "stays"), (7, Some(70), "x")], Some(75));
        assert_eq!(records.values().len(), 1);
        // Made again, and one whose event was lost, which only a later list shows.
        records.apply(5, Some(300_000), "again");
        assert_eq!(records.get(&5).map(|it| **it), Some("again"));
        records.reset(
            [(0, Some(1), "stays"), (5, Some(300_000), "again"), (9, Some(95), "lost")],
            Some(300_001),
        );
        assert_eq!(records.get(&9).map(|it| **it), Some("lost"));
        assert!(records.gone.is_empty());
    }
}

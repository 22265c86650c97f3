//! Maps that a request looks into.

use std::collections::{HashMap, HashSet};

/// Hashes the keys of these maps. It has a seed of its own in every process, but it is no defence against somebody who chooses
/// very many keys: those of these maps are bounded by what runs on a node. SipHash, which the standard library has for any
/// key, takes ten times as long for a pod's UID, and a request looks up ten of them.
pub type Hashing = foldhash::fast::RandomState;

/// A map that a request looks into.
pub type RequestMap<K, V> = HashMap<K, V, Hashing>;

/// A set that a request looks into.
pub type RequestSet<K> = HashSet<K, Hashing>;

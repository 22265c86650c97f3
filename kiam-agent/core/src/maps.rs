//! Maps that a request looks into.

use std::collections::{HashMap, HashSet};

/// Hashes the keys of these maps, with a seed of its own in every process. It promises less than SipHash, the standard
/// library's, against somebody who chooses very many keys. Here these are names of objects that an API server holds, and
/// pods of the node: nobody sees their hashes, and few of them are a tenant's. A request looks up ten of them.
pub type Hashing = foldhash::fast::RandomState;

/// A map that a request looks into.
pub type RequestMap<K, V> = HashMap<K, V, Hashing>;

/// A set that a request looks into.
pub type RequestSet<K> = HashSet<K, Hashing>;

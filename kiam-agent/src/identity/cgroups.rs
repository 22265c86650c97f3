//! Cgroup ids to pods, without walking.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    intercept::Cgroup,
    pods::{PodUid, Unattested},
};

/// Ids are not used again within a boot, so what was found holds; the cache is emptied when it is full.
const CACHED: usize = 4096;

/// Finds the pod that a cgroup belongs to; cheap to clone.
#[derive(Clone, Debug)]
pub struct CgroupPaths(Arc<Mutex<Paths>>);

#[derive(Debug)]
struct Paths {
    root: Cgroup,
    known: HashMap<u64, PodUid>,
}

// === impl CgroupPaths ===

impl CgroupPaths {
    /// For cgroups below `root`, the pods' cgroup.
    #[must_use]
    pub fn new(root: Cgroup) -> Self {
        Self(Arc::new(Mutex::new(Paths { root, known: HashMap::new() })))
    }

    /// The pods' cgroup is another one from now on.
    pub fn follow(&self, root: Cgroup) {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        paths.root = root;
    }

    /// The pod whose cgroup `id` is, or is below.
    ///
    /// # Errors
    ///
    /// [`Unattested::Gone`] when the cgroup was removed, [`Unattested::NotAPod`] when it is below no pod.
    pub fn pod(&self, id: u64) -> Result<PodUid, Unattested> {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = paths.known.get(&id) {
            return Ok(uid.clone());
        }
        let path = paths.root.path_of(id).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE) => Unattested::Gone(id),
            _ => Unattested::Unreadable(format!("cgroup {id}: {error}")),
        })?;
        let below = path.strip_prefix(paths.root.path()).ok();
        let uid = below.and_then(PodUid::from_cgroup_path);
        let uid = uid.ok_or_else(|| Unattested::NotAPod(format!("{path:?}")))?;
        if paths.known.len() >= CACHED {
            paths.known.clear();
        }
        paths.known.insert(id, uid.clone());
        Ok(uid)
    }
}

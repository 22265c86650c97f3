//! Cgroups that are treated otherwise than their surroundings.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use kiam_common::CGROUP_INTERCEPT;

use crate::error::Error;

const NAME: &str = "CGROUPS";

/// The kernel's list of them. Cheap to clone.
#[derive(Clone)]
pub struct Marks(Arc<Mutex<HashMap<MapData, u64, u32>>>);

// === impl Marks ===

impl Marks {
    /// Those that are pinned in the folder `pins`.
    pub(crate) fn open(pins: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Map { name: NAME, source };
        let map = MapData::from_pin(pins.join(NAME)).map_err(failed)?;
        let marks = HashMap::try_from(Map::HashMap(map)).map_err(failed)?;
        Ok(Self(Arc::new(Mutex::new(marks))))
    }

    /// Has connects from `cgroup`, and below it, intercepted, though those of the cgroup above pass.
    pub(crate) fn intercept(&self, cgroup: u64) -> Result<(), Error> {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let inserted = marks.insert(cgroup, CGROUP_INTERCEPT, 0);
        inserted.map_err(|source| Error::Map { name: NAME, source })
    }

    /// Takes the mark of `cgroup` away; one that is not there is no error.
    pub(crate) fn remove(&self, cgroup: u64) -> Result<(), Error> {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match marks.remove(&cgroup) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(Error::Map { name: NAME, source }),
        }
    }
}

impl fmt::Debug for Marks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Marks")
    }
}

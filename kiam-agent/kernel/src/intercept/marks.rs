//! The marks of cgroups that are treated differently from the cgroups around them.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, Map, MapData, MapError};
use kiam_common::{CgroupMark, names::map::CGROUPS as NAME};

use crate::error::Error;

/// The kernel's map of marked cgroups. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Marks(Arc<Mutex<HashMap<MapData, u64, u32>>>);

// === impl Marks ===

impl Marks {
    /// Opens the map in the folder `pins`.
    pub(crate) fn open(pins: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Map { name: NAME, source };
        let map = MapData::from_pin(pins.join(NAME)).map_err(failed)?;
        let marks = HashMap::try_from(Map::HashMap(map)).map_err(failed)?;
        Ok(Self(Arc::new(Mutex::new(marks))))
    }

    /// Has connects from `cgroup` and below intercepted, even if those of its ancestors pass.
    pub(crate) fn intercept(&self, cgroup: u64) -> Result<(), Error> {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let inserted = marks.insert(cgroup, CgroupMark::Intercept as u32, 0);
        inserted.map_err(|source| Error::Map { name: NAME, source })
    }

    /// Removes the mark of `cgroup`. A missing mark is no error.
    pub(crate) fn remove(&self, cgroup: u64) -> Result<(), Error> {
        let mut marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match marks.remove(&cgroup) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(Error::Map { name: NAME, source }),
        }
    }
}

//! The kernel programs' table of pods' network namespaces.

use std::{
    collections::HashMap as Entries,
    os::fd::{AsFd, AsRawFd as _},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, Map, MapData, MapError, SkStorage};
use kiam_common::{
    client::Sandbox,
    names::map::{LISTENERS as MARKS, SANDBOXES as NAME},
};

use crate::{error::Error, sys::batch};

/// The kernel's table of pods' network namespaces, by cookie. Cheap to clone.
///
/// With `--identity=kernel` pods' connects are redirected only from a namespace in this table, to its pod listener if it
/// has one.
#[derive(Clone, Debug)]
pub struct SandboxTable(Arc<Mutex<Maps>>);

#[derive(Debug)]
struct Maps {
    sandboxes: HashMap<MapData, u64, Sandbox>,
    /// The same map, since aya does not show the descriptor of a typed one.
    descriptor: MapData,
    marks: SkStorage<MapData, u32>,
}

// === impl SandboxTable ===

impl SandboxTable {
    /// Opens the maps in the folder `pins`.
    pub(crate) fn open(pins: &Path) -> Result<Self, Error> {
        let map = |name| {
            let map = MapData::from_pin(pins.join(name));
            map.map_err(|source| Error::Map { name, source })
        };
        let sandboxes = HashMap::try_from(Map::HashMap(map(NAME)?)).map_err(failed(NAME))?;
        let marks = SkStorage::try_from(Map::SkStorage(map(MARKS)?)).map_err(failed(MARKS))?;
        let descriptor = map(NAME)?;
        Ok(Self(Arc::new(Mutex::new(Maps { sandboxes, descriptor, marks }))))
    }

    /// Marks `sockets`, the pod listeners in the network namespace of cookie `netns`, and then lets the pod of `sandbox`
    /// connect from there, to these listeners if there are any.
    ///
    /// # Errors
    ///
    /// The kernel's. Then connects go where they went before.
    pub fn publish<S: AsFd>(
        &self,
        netns: u64,
        sandbox: Sandbox,
        sockets: &[S],
    ) -> Result<(), Error> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for socket in sockets {
            let marked = maps.marks.insert(&socket.as_fd().as_raw_fd(), 1, 0);
            marked.map_err(failed(MARKS))?;
        }
        maps.sandboxes.insert(netns, sandbox, 0).map_err(failed(NAME))
    }

    /// Removes the namespace, so that no pod can connect from it. A missing entry is no error.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn withdraw(&self, netns: u64) -> Result<(), Error> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match maps.sandboxes.remove(&netns) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(Error::Map { name: NAME, source }),
        }
    }

    /// The entry of the network namespace of cookie `netns`, if there is one.
    #[must_use]
    pub fn get(&self, netns: u64) -> Option<Sandbox> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.sandboxes.get(&netns, 0).ok()
    }

    /// All entries by namespace, those of an earlier agent included, by one call of `bpf(2)` for each few hundred.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn entries(&self) -> Result<Entries<u64, Sandbox>, Error> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = batch::entries(maps.descriptor.fd().as_fd());
        let entries = entries.map_err(|error| Error::Map { name: NAME, source: error.into() })?;
        Ok(entries.into_iter().collect())
    }

    /// The namespaces in the table, those of an earlier agent included.
    #[must_use]
    pub fn namespaces(&self) -> Vec<u64> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.sandboxes.keys().flatten().collect()
    }
}

fn failed(name: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { name, source }
}

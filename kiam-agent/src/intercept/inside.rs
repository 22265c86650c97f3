//! The agent's listeners inside pods' network namespaces, as the kernel programs know them.

use std::{
    fmt,
    os::fd::{AsFd, AsRawFd as _},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use aya::maps::{HashMap, Map, MapData, MapError, SkStorage};
use kiam_common::client::InsidePorts;

use super::Error;

const NAME: &str = "INSIDE";
const MARKS: &str = "LISTENERS";

/// Tells the programs where there is a listener inside a network namespace. Cheap to clone.
#[derive(Clone)]
pub struct Inside(Arc<Mutex<Maps>>);

struct Maps {
    ports: HashMap<MapData, u64, InsidePorts>,
    marks: SkStorage<MapData, u32>,
}

// === impl Inside ===

impl Inside {
    /// What is pinned in the folder `pins`.
    pub(super) fn open(pins: &Path) -> Result<Self, Error> {
        let map = |name| {
            let map = MapData::from_pin(pins.join(name));
            map.map_err(|source| Error::Map { name, source })
        };
        let ports = HashMap::try_from(Map::HashMap(map(NAME)?)).map_err(failed(NAME))?;
        let marks = SkStorage::try_from(Map::SkStorage(map(MARKS)?)).map_err(failed(MARKS))?;
        Ok(Self(Arc::new(Mutex::new(Maps { ports, marks }))))
    }

    /// Marks `sockets`, and then sends connects from the network namespace of cookie `netns` to their `ports`.
    ///
    /// # Errors
    ///
    /// The kernel's; connects go as they went before.
    pub fn publish<S: AsFd>(
        &self,
        netns: u64,
        ports: InsidePorts,
        sockets: &[S],
    ) -> Result<(), Error> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for socket in sockets {
            let marked = maps.marks.insert(&socket.as_fd().as_raw_fd(), 1, 0);
            marked.map_err(failed(MARKS))?;
        }
        maps.ports.insert(netns, ports, 0).map_err(failed(NAME))
    }

    /// Sends no more connects there. What is not known is no error.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn withdraw(&self, netns: u64) -> Result<(), Error> {
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match maps.ports.remove(&netns) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(Error::Map { name: NAME, source }),
        }
    }

    /// Where connects from the network namespace of cookie `netns` are sent; `None` if they are not, or nobody knows.
    #[must_use]
    pub fn ports(&self, netns: u64) -> Option<InsidePorts> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.ports.get(&netns, 0).ok()
    }

    /// The namespaces that connects are sent inside of; an earlier agent's as well.
    #[must_use]
    pub fn namespaces(&self) -> Vec<u64> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.ports.keys().flatten().collect()
    }
}

impl fmt::Debug for Inside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inside")
    }
}

fn failed(name: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { name, source }
}

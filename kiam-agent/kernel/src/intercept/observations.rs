//! The pods that used the IMDS in `--mode=observe`.

use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use kiam_common::{
    client::{Sighting, Sightings},
    counters::VerdictReason,
    names::map::OBSERVED as NAME,
};

use crate::error::Error;

/// The kernel's map of observations, with the latest 8,192 pairs of cgroup and verdict.
#[derive(Debug)]
pub struct Observations(HashMap<MapData, Sighting, Sightings>);

/// The connects and datagrams of one cgroup, with one verdict that was not enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// The leaf cgroup of the process.
    pub cgroup: u64,
    /// The verdict in `--mode=enforce`.
    pub verdict: VerdictReason,
    /// Their number since the maps were first pinned. Not exact, since two processors may count at once.
    pub count: u64,
}

// === impl Observations ===

impl Observations {
    /// Opens the map in the folder `pins`.
    pub(super) fn open(pins: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Map { name: NAME, source };
        let map = MapData::from_pin(pins.join(NAME)).map_err(failed)?;
        HashMap::try_from(Map::LruHashMap(map)).map(Self).map_err(failed)
    }

    /// All current observations.
    #[must_use]
    pub fn all(&self) -> Vec<Observation> {
        let held = self.0.iter().flatten().filter_map(|(seen, sightings)| {
            let verdict = *VerdictReason::COUNTED.get(seen.reason as usize)?;
            Some(Observation { cgroup: seen.cgroup, verdict, count: sightings.count })
        });
        held.collect()
    }
}

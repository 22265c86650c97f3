//! The time since when pods are intercepted without a gap.
//!
//! Links outlive agents, and takeovers only replace the programs in them. So the age of the youngest link that intercepts is the
//! answer, and the kernel tells nobody how old a link is: agents note it, by the link's id, in a map that is pinned beside it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use rustix::time::{ClockId, clock_gettime};

use super::programs::map_error;
use crate::{error::Error, pins, sys::links::PinnedLink};

const NAME: &str = "ATTACHED";
/// The programs without which a pod gets the node's credentials: these are answered over TCP alone. The others keep agents and
/// identities safe, and a release may add some: pods were intercepted before they came.
const INTERCEPTING: [&str; 2] = ["kiam_connect6", "kiam_connect4"];

/// Since when pods' IMDS traffic does not get to the real service, as times since the node booted ([`since_boot`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterceptedSince {
    /// By the kernel programs: that of all pods.
    pub programs: Duration,
    /// By the boot guard's routing rules and then by the programs: that of pods with a network of their own whose packets pass
    /// the node's routing. As `programs` where no boot guard was there.
    pub routing: Duration,
}

type Noted = HashMap<MapData, u32, u64>;

/// The time since the node booted, in the clock of processes' start times. Steps of the wall clock do not change it.
#[must_use]
pub fn since_boot() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(time.tv_sec.unsigned_abs(), nanos)
}

/// Notes since when the links that intercept, which are pinned in `pins`, do so, as far as that is not noted yet. The rules of a
/// boot guard were there since `routing`, and are. Returns what holds for all links; `None` where one is missing.
pub(super) fn note(
    pins: &Path,
    routing: Option<Duration>,
) -> Result<Option<InterceptedSince>, Error> {
    let failed = map_error(NAME);
    let mut noted = open(pins)?;
    let mut links = Vec::new();
    let mut since: Option<InterceptedSince> = None;
    for program in INTERCEPTING {
        let pin = pins::link(pins, program);
        let Some(link) = PinnedLink::open(&pin)? else { return Ok(None) };
        let id = link.id(&pin)?;
        let of_link = match InterceptedSince::read(&noted, id) {
            Some(known) => known,
            None => {
                let programs = since_boot();
                let routing = routing.map_or(programs, |routing| routing.min(programs));
                let new = InterceptedSince { programs, routing };
                new.write(&mut noted, id).map_err(&failed)?;
                new
            }
        };
        links.extend([id, by_routing(id)]);
        since = Some(since.map_or(of_link, |since| since.and(of_link)));
    }
    // Ids are not used again, and there are more entries whenever a program is attached anew.
    remove(&mut noted, |id| !links.contains(&id));
    Ok(since)
}

/// Forgets since when links intercept, before programs that only observe take their places.
pub(super) fn forget(pins: &Path) -> Result<(), Error> {
    remove(&mut open(pins)?, |_| true);
    Ok(())
}

/// Takes over what is noted in the `older` layouts, whose links stay. One that can't be read has noted nothing.
pub(super) fn carry(pins: &Path, older: &[PathBuf]) -> Result<(), Error> {
    for folder in older.iter().filter(|folder| folder.join(NAME).exists()) {
        let Ok(before) = open(folder) else { continue };
        let mut noted = open(pins)?;
        for (id, nanos) in before.iter().flatten() {
            if noted.get(&id, 0).is_err() {
                noted.insert(id, nanos, 0).map_err(map_error(NAME))?;
            }
        }
    }
    Ok(())
}

fn open(pins: &Path) -> Result<Noted, Error> {
    let map = MapData::from_pin(pins.join(NAME)).map_err(map_error(NAME))?;
    HashMap::try_from(Map::HashMap(map)).map_err(map_error(NAME))
}

fn remove(noted: &mut Noted, is_gone: impl Fn(u32) -> bool) {
    let gone: Vec<u32> = noted.keys().flatten().filter(|id| is_gone(*id)).collect();
    for id in gone {
        // Another agent may have been faster.
        let _ = noted.remove(&id);
    }
}

/// The key of [`InterceptedSince::routing`]: the kernel's ids are positive as `int`s.
fn by_routing(link: u32) -> u32 {
    !link
}

// === impl InterceptedSince ===

impl InterceptedSince {
    fn read(noted: &Noted, link: u32) -> Option<Self> {
        let at = |key: u32| noted.get(&key, 0).ok().map(Duration::from_nanos);
        Some(Self { programs: at(link)?, routing: at(by_routing(link))? })
    }

    fn write(self, noted: &mut Noted, link: u32) -> Result<(), aya::maps::MapError> {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        noted.insert(link, nanos(self.programs), 0)?;
        noted.insert(by_routing(link), nanos(self.routing), 0)
    }

    /// Since when both hold.
    fn and(self, other: Self) -> Self {
        Self {
            programs: self.programs.max(other.programs),
            routing: self.routing.max(other.routing),
        }
    }
}

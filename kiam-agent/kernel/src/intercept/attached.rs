//! The time since when pods are intercepted without a gap.
//!
//! Links outlive agents, and takeovers only replace the programs in them. So the answer is the age of the youngest link that
//! intercepts. The kernel does not show a link's age. Agents record it, by the link's id, in a pinned map.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use aya::maps::{HashMap, Map, MapData};
use kiam_common::names::{map, program};
use rustix::time::ClockId;

use super::programs::map_error;
use crate::{
    error::Error,
    pins,
    sys::{links::PinnedLink, since_boot, uptime},
};

const NAME: &str = map::ATTACHED;
/// The key that says that programs which only observe had the links since the last record: no link has this id.
const OBSERVED: u32 = 0;
/// By this much a pin's time may be too late: that of files is the clock's at its last tick.
const TICK: Duration = Duration::from_millis(10);
/// The programs without which a pod gets the node's credentials: these are answered over TCP alone. The others keep agents and
/// identities safe, and a release may add some: pods were intercepted before they came.
const INTERCEPTING: [&str; 2] = [program::CONNECT6, program::CONNECT4];

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

/// Records since when each intercepting link in `pins` intercepts, unless it is recorded already. `routing` is when the boot guard
/// set its rules. Returns the time since when all of them do; `None` if one is missing.
pub(super) fn note(
    pins: &Path,
    routing: Option<Duration>,
) -> Result<Option<InterceptedSince>, Error> {
    let failed = map_error(NAME);
    let mut noted = open(pins)?;
    let observed = noted.get(&OBSERVED, 0).is_ok();
    let mut links = Vec::new();
    let mut since: Option<InterceptedSince> = None;
    for program in INTERCEPTING {
        let pin = pins::link(pins, program);
        let Some(link) = PinnedLink::open(&pin)? else { return Ok(None) };
        let id = link.id(&pin)?;
        let of_link = match InterceptedSince::read(&noted, id) {
            Some(known) => known,
            None => {
                let programs = if observed { since_boot() } else { pinned(&pin)? };
                let routing = routing.map_or(programs, |routing| routing.min(programs));
                let new = InterceptedSince { programs, routing };
                new.write(&mut noted, id).map_err(&failed)?;
                new
            }
        };
        links.extend([id, by_routing(id)]);
        since = Some(since.map_or(of_link, |since| since.and(of_link)));
    }
    // Ids are not reused, so each new link adds entries.
    remove(&mut noted, |id| !links.contains(&id));
    Ok(since)
}

/// Forgets since when links intercept, before programs that only observe take their places. The age of the pins counts for
/// nothing from then on.
pub(super) fn forget(pins: &Path) -> Result<(), Error> {
    let mut noted = open(pins)?;
    remove(&mut noted, |_| true);
    noted.insert(OBSERVED, 0, 0).map_err(map_error(NAME))
}

/// The time when the link at `pin` was pinned, right after it was attached. The link seems younger if the pin was restored since.
/// This is for links of an agent that ended before it could record them, or that recorded nothing.
fn pinned(pin: &Path) -> Result<Duration, Error> {
    let failed = |source| Error::File { what: "read the age of", path: PathBuf::from(pin), source };
    let modified = fs::metadata(pin).and_then(|pin| pin.modified()).map_err(failed)?;
    let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall = uptime::read(ClockId::Realtime);
    // A pin from the future is from before the clock was set back.
    let age = wall.saturating_sub(modified).saturating_sub(TICK);
    Ok(since_boot().saturating_sub(age))
}

/// Copies the records of `older` layouts, whose links stay. A layout that can't be read has none.
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
        let programs = at(link)?;
        Some(Self { programs, routing: at(by_routing(link)).unwrap_or(programs) })
    }

    fn write(self, noted: &mut Noted, link: u32) -> Result<(), aya::maps::MapError> {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        noted.insert(link, nanos(self.programs), 0)?;
        noted.insert(by_routing(link), nanos(self.routing), 0)
    }

    /// The later of the times, since when both links intercept.
    fn and(self, other: Self) -> Self {
        Self {
            programs: self.programs.max(other.programs),
            routing: self.routing.max(other.routing),
        }
    }
}

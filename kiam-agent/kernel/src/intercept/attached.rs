//! The time since when pods are intercepted without a gap.
//!
//! Links outlive agents, and takeovers only replace the programs in them. So the answer is the age of the youngest link.
//! The kernel does not show a link's age. Agents record it, by the link's id, in a pinned map.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use rustix::time::{ClockId, Timespec, clock_gettime};

use super::programs::map_error;
use crate::{error::Error, pins, sys::links::PinnedLink};

const NAME: &str = "ATTACHED";
/// File systems round their times down to the clock's last tick.
const TICK: Duration = Duration::from_millis(10);

/// The time since the node booted, in the clock of processes' start times. Steps of the wall clock do not change it.
#[must_use]
pub fn since_boot() -> Duration {
    duration(clock_gettime(ClockId::Boottime))
}

fn duration(time: Timespec) -> Duration {
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(time.tv_sec.unsigned_abs(), nanos)
}

/// Records when the links of `programs` in `pins` were attached, unless it is recorded already. Returns the time of the
/// youngest link; `None` if one is missing.
pub(super) fn record(pins: &Path, programs: &[&str]) -> Result<Option<Duration>, Error> {
    let failed = map_error(NAME);
    let map = MapData::from_pin(pins.join(NAME)).map_err(&failed)?;
    let mut recorded: HashMap<MapData, u32, u64> =
        HashMap::try_from(Map::HashMap(map)).map_err(&failed)?;
    let mut links = Vec::new();
    let mut youngest = None;
    let mut complete = true;
    for program in programs {
        let pin = pins::link(pins, program);
        let Some(link) = PinnedLink::open(&pin)? else {
            complete = false;
            continue;
        };
        let id = link.id(&pin)?;
        let known = recorded.get(&id, 0).ok().map(Duration::from_nanos);
        let attached = match known {
            Some(attached) => attached,
            None => {
                let attached = pinned(&pin)?;
                let nanos = u64::try_from(attached.as_nanos()).unwrap_or(u64::MAX);
                recorded.insert(id, nanos, 0).map_err(&failed)?;
                attached
            }
        };
        links.push(id);
        youngest = youngest.max(Some(attached));
    }
    // Ids are not reused, so each new link adds an entry.
    let gone: Vec<u32> = recorded.keys().flatten().filter(|id| !links.contains(id)).collect();
    for id in gone {
        // Another agent may have been faster.
        let _ = recorded.remove(&id);
    }
    Ok(youngest.filter(|_| complete))
}

/// The time when the link at `pin` was pinned, right after it was attached. The link seems younger if the pin was restored
/// since. This is for links of a release that recorded nothing, or of an agent that ended before it could.
fn pinned(pin: &Path) -> Result<Duration, Error> {
    let failed = |source| Error::File { what: "read the age of", path: PathBuf::from(pin), source };
    let modified = fs::metadata(pin).and_then(|pin| pin.modified()).map_err(failed)?;
    let modified = modified.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (wall, now) = (duration(clock_gettime(ClockId::Realtime)), since_boot());
    // A pin from the future is older than a step of the clock.
    let age = wall.saturating_sub(modified).saturating_sub(TICK);
    Ok(now.saturating_sub(age))
}

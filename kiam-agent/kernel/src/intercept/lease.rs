//! The lease: the kernel redirects only while the agent has shown, within ten seconds, that it lives.

use std::{fmt, path::Path, time::Duration};

use aya::maps::{Array, Map, MapData};
use rustix::time::{ClockId, clock_gettime};

use crate::{error::Error, pins};

const NAME: &str = "LEASE";

/// The agent's sign of life in the kernel.
pub struct Lease(Array<MapData, u64>);

fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// How long ago an agent with pins below `bpffs` showed that it lives; `None` where it has ended its lease, or none ever
/// did.
#[must_use]
pub fn last_renewed(bpffs: &Path) -> Option<Duration> {
    let map = MapData::from_pin(pins::current(bpffs).join(NAME)).ok()?;
    let map: Array<MapData, u64> = Map::from_map_data(map).ok()?.try_into().ok()?;
    let renewed = map.get(&0, 0).ok().filter(|renewed| *renewed > 0)?;
    Some(Duration::from_nanos(now().saturating_sub(renewed)))
}

// === impl Lease ===

impl Lease {
    /// How often it is to be renewed: a tenth of how long it lasts.
    pub const RENEWAL: Duration = Duration::from_secs(1);

    pub(super) fn new(map: Array<MapData, u64>) -> Self {
        Self(map)
    }

    /// Writes the time of `CLOCK_MONOTONIC`, which is `bpf_ktime_get_ns`'s clock.
    ///
    /// # Errors
    ///
    /// The kernel's, when the map can't be written.
    pub fn renew(&mut self) -> Result<(), Error> {
        self.write(now())
    }

    /// Ends it: the kernel denies from now on, at once.
    ///
    /// # Errors
    ///
    /// As [`Lease::renew`].
    pub fn end(&mut self) -> Result<(), Error> {
        self.write(0)
    }

    fn write(&mut self, ns: u64) -> Result<(), Error> {
        self.0.set(0, ns, 0).map_err(|source| Error::Map { name: NAME, source })
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lease")
    }
}

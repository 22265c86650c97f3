//! The lease: the kernel redirects only if the agent has renewed it within ten seconds.

use std::{fmt, path::Path, time::Duration};

use aya::maps::{Array, Map, MapData};
use kiam_common::names::map::LEASE as NAME;
use rustix::time::{ClockId, clock_gettime};

use crate::{error::Error, pins};

/// The agent's heartbeat in the kernel.
pub struct Lease(Array<MapData, u64>);

fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The time since an agent with pins below `bpffs` renewed its lease; `None` if the lease has ended or never began.
#[must_use]
pub fn last_renewed(bpffs: &Path) -> Option<Duration> {
    let map = MapData::from_pin(pins::current(bpffs).join(NAME)).ok()?;
    let map: Array<MapData, u64> = Map::from_map_data(map).ok()?.try_into().ok()?;
    let renewed = map.get(&0, 0).ok().filter(|renewed| *renewed > 0)?;
    Some(Duration::from_nanos(now().saturating_sub(renewed)))
}

// === impl Lease ===

impl Lease {
    /// The interval of renewals: a fifth of the lease's duration.
    pub const RENEWAL: Duration = Duration::from_secs(2);

    pub(super) fn new(map: Array<MapData, u64>) -> Self {
        Self(map)
    }

    /// Renews the lease, by the time of `CLOCK_MONOTONIC`, the clock of `bpf_ktime_get_ns`.
    ///
    /// # Errors
    ///
    /// The kernel's, when the map can't be written.
    pub fn renew(&mut self) -> Result<(), Error> {
        self.write(now())
    }

    /// Ends the lease: from now on the kernel denies.
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

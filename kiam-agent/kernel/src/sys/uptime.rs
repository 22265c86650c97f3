//! The time since the node booted.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The time since the node booted, in the clock of processes' start times. Steps of the wall clock do not change it.
#[must_use]
pub fn since_boot() -> Duration {
    read(ClockId::Boottime)
}

/// The time of a clock that is not before its epoch.
pub(crate) fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(time.tv_sec.unsigned_abs(), nanos)
}

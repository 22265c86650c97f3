//! Real-time threads.
//!
//! On a busy node an ordinary thread waits for other threads: one time slice for each, or more in a cgroup with little
//! `cpu.weight`. In a cgroup that has used up its `cpu.max` it waits for the next period. `SCHED_FIFO` (sched(7)) ignores
//! both. It needs CAP_SYS_NICE, and a kernel that allows real-time in cgroups (no `CONFIG_RT_GROUP_SCHED`).

use std::io;

/// The lowest real-time priority, which precedes every ordinary thread.
const PRIORITY: i32 = 1;

/// Makes this thread a real-time thread.
///
/// # Errors
///
/// The system's; the thread then stays an ordinary one.
pub fn enter() -> io::Result<()> {
    schedule(libc::SCHED_FIFO, PRIORITY)
}

/// Runs `work` with ordinary scheduling, on a thread that may be real-time.
pub fn ordinary<T>(work: impl FnOnce() -> T) -> T {
    let _ordinary = is_realtime().then(OrdinaryScheduling::begin);
    work()
}

/// Whether this is a real-time thread.
#[must_use]
pub fn is_realtime() -> bool {
    // SAFETY: it takes no memory of ours; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_FIFO }
}

/// A guard under which this thread has ordinary scheduling.
struct OrdinaryScheduling;

impl OrdinaryScheduling {
    fn begin() -> Self {
        // Always allowed.
        let _ = schedule(libc::SCHED_OTHER, 0);
        Self
    }
}

impl Drop for OrdinaryScheduling {
    fn drop(&mut self) {
        // It was allowed before. If it fails now, this thread stays an ordinary one.
        let _ = enter();
    }
}

fn schedule(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: `parameters` outlives the call, which only reads it; 0 is the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

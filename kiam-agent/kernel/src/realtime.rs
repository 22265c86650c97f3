//! Threads that run before all that is not real-time.
//!
//! On a busy node a thread of the ordinary scheduling class waits for the others to run at all: for one slice of each
//! neighbour, and an agent with little `cpu.weight` for more; one that has used up its cgroup's `cpu.max` waits for the
//! next period. `SCHED_FIFO` (sched(7)) has no such queue, and neither counts in it. It needs CAP_SYS_NICE, and a kernel
//! that does not keep real-time from cgroups (`CONFIG_RT_GROUP_SCHED`).

use std::io;

/// The least of the real-time priorities, which is before every ordinary thread.
const PRIORITY: i32 = 1;

/// Puts this thread before the node's ordinary ones.
///
/// # Errors
///
/// When the system refuses; the thread takes its turn then, as before.
pub fn enter() -> io::Result<()> {
    schedule(libc::SCHED_FIFO, PRIORITY)
}

/// Does `work` when this thread's turn comes, although it is a hurried one.
pub fn ordinary<T>(work: impl FnOnce() -> T) -> T {
    let _waits = is_realtime().then(OrdinaryScheduling::begin);
    work()
}

/// Whether this thread is before the ordinary ones.
#[must_use]
pub fn is_realtime() -> bool {
    // SAFETY: it takes no memory of ours; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_FIFO }
}

/// While this is there, this thread takes its turn.
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
        // Allowed before; if it is no longer, this thread takes its turn from now on.
        let _ = enter();
    }
}

fn schedule(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: `parameters` outlives the call, which only reads it; 0 is the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

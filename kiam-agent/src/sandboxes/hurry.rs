//! What a new pod waits for runs before all that is not real-time.
//!
//! A pod's first process may connect milliseconds after its sandbox is there, and on a busy node a thread of the
//! ordinary scheduling class waits for those to run at all: for one slice of each neighbour, and an agent with little
//! `cpu.weight` for more. `SCHED_FIFO` (sched(7)) has no such queue, and cgroups' weights don't count in it. It needs
//! CAP_SYS_NICE, and a kernel that does not keep real-time from cgroups (`CONFIG_RT_GROUP_SCHED`).

use std::{io, thread};

use tokio::{runtime::Builder, sync::oneshot};
use tracing::warn;

use super::{Error, TOGETHER};

/// The least of the real-time priorities, which is before every ordinary thread.
const PRIORITY: i32 = 1;

/// Does `work` on a thread and a runtime of its own, ahead of the node's ordinary threads, and so does what it has
/// done by [`spawn_blocking`](tokio::task::spawn_blocking), unless that is [`unhurried`]. What is returned ends with
/// `work`.
///
/// Where the system refuses, which is logged, it takes its turn.
///
/// # Errors
///
/// [`Error::Thread`].
pub fn hurried(
    work: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = ()> + Send + 'static, Error> {
    let mut builder = Builder::new_current_thread();
    let built = builder.enable_all().max_blocking_threads(2 * TOGETHER).build();
    let runtime = built.map_err(Error::Thread)?;
    let (running, ended) = oneshot::channel::<()>();
    let run = move || {
        if let Err(error) = schedule(libc::SCHED_FIFO, PRIORITY) {
            warn!(%error, "SCHED_FIFO is refused, so that the first connects of new pods on a busy node may go by the node's path");
        }
        runtime.block_on(work);
        drop(running);
        // A look that is on is not waited for.
        runtime.shutdown_background();
    };
    let thread = thread::Builder::new().name("sandboxes".to_owned());
    thread.spawn(run).map_err(Error::Thread)?;
    // Ended with the thread, however that ended.
    Ok(async { drop(ended.await) })
}

/// Does `work` when this thread's turn comes, although it is a hurried one.
pub(super) fn unhurried<T>(work: impl FnOnce() -> T) -> T {
    let _waits = is_hurried().then(Waits::begin);
    work()
}

/// While this is there, this thread takes its turn.
struct Waits;

impl Waits {
    fn begin() -> Self {
        // Always allowed.
        let _ = schedule(libc::SCHED_OTHER, 0);
        Self
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        // Allowed before; if it is no longer, this thread's next looks wait.
        let _ = schedule(libc::SCHED_FIFO, PRIORITY);
    }
}

fn is_hurried() -> bool {
    // SAFETY: it takes no memory of ours; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) == libc::SCHED_FIFO }
}

fn schedule(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: `parameters` outlives the call, which only reads it; 0 is the calling thread.
    let done = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use tokio::task::spawn_blocking;

    use super::*;

    #[tokio::test]
    async fn work_and_its_looks_are_hurried_but_those_that_take_their_turn() {
        let (sender, seen) = oneshot::channel();
        let ended = hurried(async move {
            let look = || (is_hurried(), unhurried(is_hurried), is_hurried());
            sender.send((is_hurried(), spawn_blocking(look).await.unwrap())).unwrap();
        });
        ended.unwrap().await;
        let allowed =
            thread::spawn(|| schedule(libc::SCHED_FIFO, PRIORITY).is_ok()).join().unwrap();
        assert_eq!(seen.await.unwrap(), (allowed, (allowed, false, allowed)));
        assert!(!is_hurried(), "the caller is");
    }

    #[tokio::test]
    async fn a_panic_ends_it() {
        hurried(async { panic!("as it must not") }).unwrap().await;
    }
}

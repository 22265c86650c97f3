//! The real-time thread that opens pod listeners.
//!
//! A pod's first process may connect milliseconds after its sandbox exists, which is sooner than an ordinary thread of a
//! busy node runs: see [`realtime`].

use std::thread;

use tokio::{runtime::Builder, sync::oneshot};
use tracing::warn;

use super::{Error, SCANS_AT_ONCE};
use crate::realtime;

/// Runs `work` on a real-time thread with a runtime of its own. Tasks that it starts by
/// [`spawn_blocking`](tokio::task::spawn_blocking) are real-time too, unless they are [ordinary](realtime::ordinary). The
/// returned future ends with `work`.
///
/// If the system forbids it, which is logged, the thread has ordinary scheduling.
///
/// # Errors
///
/// [`Error::Thread`].
pub fn on_realtime_thread(
    work: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = ()> + Send + 'static, Error> {
    let mut builder = Builder::new_current_thread();
    let built = builder.enable_all().max_blocking_threads(2 * SCANS_AT_ONCE).build();
    let runtime = built.map_err(Error::Thread)?;
    let (running, ended) = oneshot::channel::<()>();
    let run = move || {
        if let Err(error) = realtime::enter() {
            warn!(%error, "SCHED_FIFO is not allowed, so the first connects of new pods on a busy node may go to the node listener");
        }
        runtime.block_on(work);
        drop(running);
        // A scan in progress is abandoned.
        runtime.shutdown_background();
    };
    let thread = thread::Builder::new().name("sandboxes".to_owned());
    thread.spawn(run).map_err(Error::Thread)?;
    // Dropped by the thread's end, even after a panic.
    Ok(async { drop(ended.await) })
}

#[cfg(test)]
mod tests {
    use tokio::task::spawn_blocking;

    use super::*;
    use crate::realtime::{is_realtime, ordinary};

    #[tokio::test]
    async fn work_and_its_scans_are_realtime_but_for_ordinary_ones() {
        let (sender, seen) = oneshot::channel();
        let ended = on_realtime_thread(async move {
            let scan = || (is_realtime(), ordinary(is_realtime), is_realtime());
            sender.send((is_realtime(), spawn_blocking(scan).await.unwrap())).unwrap();
        });
        ended.unwrap().await;
        let allowed = thread::spawn(|| realtime::enter().is_ok()).join().unwrap();
        assert_eq!(seen.await.unwrap(), (allowed, (allowed, false, allowed)));
        assert!(!is_realtime(), "the caller is");
    }

    #[tokio::test]
    async fn a_panic_ends_it() {
        on_realtime_thread(async { panic!("as it must not") }).unwrap().await;
    }
}

//! Work that may wait for the kernel or the disk, off the runtime's threads.
//!
//! A runtime thread that blocks delays every task behind it: other pods' requests, and the lease. So slow work, such as
//! a walk of cgroups or of `/proc`, takes a [`Blocking`], which only dedicated threads have.

use std::marker::PhantomData;

use tokio::{
    runtime::{Handle, RuntimeFlavor},
    task::{JoinHandle, block_in_place},
};

/// Proof that the current thread may block. It can't be sent to another thread.
#[derive(Debug)]
pub struct Blocking(PhantomData<*const ()>);

// === impl Blocking ===

impl Blocking {
    /// The proof for this thread; `None` on a runtime's thread.
    #[must_use]
    pub fn here() -> Option<Self> {
        Handle::try_current().is_err().then_some(Self(PhantomData))
    }
}

/// Runs `work` on a thread for blocking work.
pub fn spawn<T: Send + 'static>(
    work: impl FnOnce(&Blocking) -> T + Send + 'static,
) -> JoinHandle<T> {
    tokio::task::spawn_blocking(move || work(&Blocking(PhantomData)))
}

/// Runs `work`, which computes for long, on this thread. The runtime moves its other tasks to another thread meanwhile.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    let flavor = Handle::try_current().map(|runtime| runtime.runtime_flavor());
    match flavor {
        Ok(RuntimeFlavor::MultiThread) => block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_of_a_runtime_may_not_block_and_one_for_such_work_may() {
        assert!(Blocking::here().is_some());
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            assert!(Blocking::here().is_none());
            let thread = std::thread::current().id();
            assert_ne!(spawn(|_| std::thread::current().id()).await.unwrap(), thread);
        });
    }
}

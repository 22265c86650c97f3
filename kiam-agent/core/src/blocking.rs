//! Work that may wait for the kernel or the disk, off the runtime's threads.
//!
//! A thread of the runtime that waits keeps every task behind it waiting: other pods' requests, and the lease. What
//! can take long, such as a walk of cgroups or of `/proc`, therefore asks for a [`Blocking`], which only threads have
//! that nothing else runs on.

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
    /// Of this thread; `None` where it belongs to a runtime.
    #[must_use]
    pub fn here() -> Option<Self> {
        Handle::try_current().is_err().then_some(Self(PhantomData))
    }
}

/// Does `work` on a thread that is for such work.
pub fn spawn<T: Send + 'static>(
    work: impl FnOnce(&Blocking) -> T + Send + 'static,
) -> JoinHandle<T> {
    tokio::task::spawn_blocking(move || work(&Blocking(PhantomData)))
}

/// Does `work`, which computes for long, on this thread. Where that is a runtime's, its other tasks go on on another one
/// meanwhile.
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

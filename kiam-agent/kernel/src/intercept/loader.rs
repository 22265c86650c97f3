//! aya's loader, without the types of the whole kernel.

use std::{io, panic, thread};

use aya::EbpfLoader;
use rustix::{
    process::chroot,
    thread::{UnshareFlags, unshare_unsafe},
};
use tracing::debug;

/// A folder that is always there, and that has no `sys` in it.
const WITHOUT_SYS: &str = "/proc/self/task";

/// A loader. Programs that are fitted to the types of the running kernel can't be loaded by it; the agent has none.
///
/// aya 0.14 reads all those types from `/sys/kernel/btf/vmlinux` when it makes a loader: 30 MB and 50 ms, each time. So the
/// loader is made on a thread that does not see the file. (aya 0.15 reads it only for programs that need it, and takes Rust
/// 1.98.)
pub(super) fn new() -> EbpfLoader<'static> {
    blindly().unwrap_or_else(|error| {
        debug!(%error, "Reading all types of the kernel, as no thread can be kept from them");
        EbpfLoader::new()
    })
}

/// A loader, made on a thread whose root is another folder.
fn blindly() -> io::Result<EbpfLoader<'static>> {
    let made = thread::Builder::new().name("loader".to_owned()).spawn(|| {
        // SAFETY: FS does not unshare the descriptor table, the one flag that is unsafe.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        chroot(WITHOUT_SYS)?;
        Ok(EbpfLoader::new())
    })?;
    made.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loader_has_read_no_types_of_the_kernel() {
        let length = |loader: &EbpfLoader<'_>| format!("{loader:?}").len();
        assert!(length(&new()) < 1_000);
        // The root of this thread is what it was.
        assert!(std::fs::exists("/proc/self").unwrap());
    }
}

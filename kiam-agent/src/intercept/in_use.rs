//! Whether an agent uses the pins: a lock on their folder, which ends with the process, however that ends.

use std::{fs::File, io, path::Path};

use rustix::fs::{FlockOperation, flock};

use super::Error;

/// An agent's share of the pins, from before it attaches anything until it is dropped.
#[derive(Debug)]
pub struct InUse(
    /// Kept open, with its lock.
    #[expect(dead_code, reason = "closing it is what ends the lock")]
    File,
);

/// Nobody uses the pins, and no agent starts to until this is dropped.
#[derive(Debug)]
pub struct Unused(#[expect(dead_code, reason = "as in InUse")] Option<File>);

/// `None` when an agent runs, or starts, with pins below `bpffs`.
///
/// # Errors
///
/// [`Error::File`] when the folder can't be asked.
pub fn unused(bpffs: &Path) -> Result<Option<Unused>, Error> {
    match lock(bpffs, FlockOperation::NonBlockingLockExclusive) {
        Ok(folder) => Ok(Some(Unused(Some(folder)))),
        // No agent was ever here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(Unused(None))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(source) => Err(failed(bpffs, source)),
    }
}

fn lock(bpffs: &Path, operation: FlockOperation) -> io::Result<File> {
    let folder = File::open(bpffs)?;
    flock(&folder, operation)?;
    Ok(folder)
}

fn failed(bpffs: &Path, source: io::Error) -> Error {
    Error::File { what: "lock", path: bpffs.to_owned(), source }
}

// === impl InUse ===

impl InUse {
    /// Takes a share of the pins below `bpffs`, which is there; agents that take over from one another both have one.
    /// Waits for an uninstallation that is under way.
    pub(super) fn share(bpffs: &Path) -> Result<Self, Error> {
        lock(bpffs, FlockOperation::LockShared).map(Self).map_err(|source| failed(bpffs, source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_unused_only_when_no_agent_has_a_share_and_then_none_gets_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let agents = [InUse::share(path).unwrap(), InUse::share(path).unwrap()];
        for agent in agents {
            assert!(unused(path).unwrap().is_none());
            drop(agent);
        }
        let held = unused(path).unwrap().unwrap();
        assert!(lock(path, FlockOperation::NonBlockingLockShared).is_err());
        drop(held);
        drop(InUse::share(path).unwrap());
        assert!(unused(&path.join("nothing")).unwrap().is_some());
    }
}

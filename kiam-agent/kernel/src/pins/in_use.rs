//! Whether an agent uses the pins, and which one may change what is attached: locks on their folders, which end with
//! the process, however that ends.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use tokio::time::Instant;

use crate::{error::Error, pins};

/// How long the agent with the attach lock may take to attach what is detached: pods are let through meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// An agent's share of the pins, from before it attaches anything until it is dropped.
#[derive(Debug)]
pub struct InUse {
    bpffs: PathBuf,
    /// Kept open, with its lock, unless an uninstallation took that.
    folder: File,
    shared: bool,
}

/// The right to change what is attached, which one agent has at a time, until it is dropped. An agent that starts has it from
/// before it asks for another agent until the next one can find it.
#[derive(Debug)]
pub struct AttachLock(#[expect(dead_code, reason = "as in Unused")] File);

/// Since when another agent has had the attach lock while this one has something to restore: that agent may hang.
#[derive(Debug, Default)]
pub(crate) struct Patience(Option<Instant>);

/// Nobody uses the pins, and no agent starts to until this is dropped.
#[derive(Debug)]
pub struct Unused(#[expect(dead_code, reason = "closing it is what ends the lock")] Option<File>);

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
    pub(crate) fn share(bpffs: &Path) -> Result<Self, Error> {
        let folder = lock(bpffs, FlockOperation::LockShared);
        let folder = folder.map_err(|source| failed(bpffs, source))?;
        Ok(Self { bpffs: bpffs.to_owned(), folder, shared: true })
    }

    /// Takes a share of the folder that is there now, where somebody has removed the one that this was a share of, or
    /// [`Self::is_alone`] has lost it. Does not wait.
    ///
    /// # Errors
    ///
    /// [`Error::File`] while there is no folder, or an uninstallation is under way.
    pub fn follow(&mut self) -> Result<(), Error> {
        let number = |metadata: io::Result<fs::Metadata>| metadata.map(|metadata| metadata.ino());
        let there = number(fs::metadata(&self.bpffs));
        let there = there.map_err(|source| failed(&self.bpffs, source))?;
        if !self.shared || number(self.folder.metadata()).ok() != Some(there) {
            let folder = lock(&self.bpffs, FlockOperation::NonBlockingLockShared);
            self.folder = folder.map_err(|source| failed(&self.bpffs, source))?;
            self.shared = true;
        }
        Ok(())
    }

    /// Whether no other agent has a share. For an instant this one has none either: an uninstallation that begins then keeps it,
    /// until [`Self::follow`] gets it back. Does not wait.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the folder can't be asked, or the share is lost.
    pub fn is_alone(&mut self) -> Result<bool, Error> {
        // What fails to get the whole loses the share as well.
        let alone = flock(&self.folder, FlockOperation::NonBlockingLockExclusive).is_ok();
        let shared = flock(&self.folder, FlockOperation::NonBlockingLockShared);
        self.shared = shared.is_ok();
        shared.map(|()| alone).map_err(|error| failed(&self.bpffs, error.into()))
    }
}

// === impl AttachLock ===

impl AttachLock {
    /// `None` while another agent has it.
    ///
    /// # Errors
    ///
    /// [`Error::File`] when the pins' folder can't be made or locked; [`Error::NewerLayout`].
    pub fn take(bpffs: &Path) -> Result<Option<Self>, Error> {
        let (pins, _) = pins::open(bpffs)?;
        match lock(&pins, FlockOperation::NonBlockingLockExclusive) {
            Ok(folder) => Ok(Some(Self(folder))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(source) => Err(failed(&pins, source)),
        }
    }
}

// === impl Patience ===

impl Patience {
    /// Whether this agent is to restore what is lost, for the other one has had its time. The first call begins that time.
    pub(crate) fn is_over(&mut self) -> bool {
        self.0.get_or_insert_with(Instant::now).elapsed() >= PATIENCE
    }

    /// Nothing is lost, or it is not the other agent that keeps this one from restoring it.
    pub(crate) fn renew(&mut self) {
        self.0 = None;
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

    #[test]
    fn an_agent_is_alone_while_no_other_has_a_share_of_the_folder_that_is_there() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("kiam");
        fs::create_dir(&path).unwrap();
        let mut agent = InUse::share(&path).unwrap();
        assert!(agent.is_alone().unwrap());
        let other = InUse::share(&path).unwrap();
        assert!(!agent.is_alone().unwrap());
        assert!(unused(&path).unwrap().is_none(), "both shares are still there");
        drop(other);
        assert!(agent.is_alone().unwrap());
        // Somebody removes the folder; until the agent follows, nobody sees it.
        fs::rename(&path, above.path().join("old")).unwrap();
        assert!(agent.follow().is_err());
        fs::create_dir(&path).unwrap();
        assert!(unused(&path).unwrap().is_some());
        agent.follow().unwrap();
        assert!(unused(&path).unwrap().is_none());
    }

    #[test]
    fn an_uninstallation_that_hangs_keeps_no_agent_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let mut agent = InUse::share(path).unwrap();
        // It got its lock in the instant in which the agent had none.
        flock(&agent.folder, FlockOperation::Unlock).unwrap();
        let held = unused(path).unwrap().unwrap();
        assert!(agent.is_alone().is_err());
        assert!(agent.follow().is_err());
        drop(held);
        agent.follow().unwrap();
        assert!(unused(path).unwrap().is_none());
        assert!(agent.is_alone().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_after_two_seconds_with_the_same_loss() {
        let mut patience = Patience::default();
        assert!(!patience.is_over());
        tokio::time::advance(PATIENCE - Duration::from_millis(1)).await;
        assert!(!patience.is_over());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(patience.is_over());
        patience.renew();
        assert!(!patience.is_over());
    }
}

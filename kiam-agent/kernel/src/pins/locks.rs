//! Locks on the folders of pins, which show whether an agent uses them and which agent may attach programs. They end with
//! the process.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::{error::Error, pins};

/// How long drift is left to another agent that has the attach lock. Pods may reach the IMDS meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the attach lock is tried while another agent that starts has it.
const RETRY: Duration = Duration::from_millis(50);
/// How long an agent that starts may take, from its sockets until it serves. One that hangs keeps nobody out for longer.
const LIMIT: Duration = Duration::from_secs(30);

/// An agent's shared lock on the pins, held from before it attaches anything. It blocks an uninstallation.
#[derive(Debug)]
pub struct AgentLock {
    bpffs: PathBuf,
    /// The open folder with the lock, unless an uninstallation has taken it.
    folder: File,
    shared: bool,
}

/// The lock for attaching programs, of one agent at a time. A starting agent holds it from before it looks for a running
/// agent until others can find it in turn.
#[derive(Debug)]
pub struct AttachLock(#[expect(dead_code, reason = "as in UninstallLock")] File);

/// The time since when this agent has waited for another agent's attach lock to repair drift. The other agent may hang.
#[derive(Debug, Default)]
pub(crate) struct Patience(Option<Instant>);

/// The exclusive lock of an uninstallation: no agent uses the pins, and none can start, until it is dropped.
#[derive(Debug)]
pub struct UninstallLock(
    #[expect(dead_code, reason = "closing it is what ends the lock")] Option<File>,
);

/// Takes the lock for an uninstallation; `None` if an agent runs or starts with pins below `bpffs`.
///
/// # Errors
///
/// [`Error::File`] if the folder can't be locked.
pub fn lock_for_uninstall(bpffs: &Path) -> Result<Option<UninstallLock>, Error> {
    match lock(bpffs, FlockOperation::NonBlockingLockExclusive) {
        Ok(folder) => Ok(Some(UninstallLock(Some(folder)))),
        // No agent was ever here.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(UninstallLock(None))),
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

// === impl AgentLock ===

impl AgentLock {
    /// Takes a shared lock on `bpffs`, which must exist. Both agents of a takeover have one. Waits for an uninstallation in
    /// progress.
    pub(crate) fn share(bpffs: &Path) -> Result<Self, Error> {
        let folder = lock(bpffs, FlockOperation::LockShared);
        let folder = folder.map_err(|source| failed(bpffs, source))?;
        Ok(Self { bpffs: bpffs.to_owned(), folder, shared: true })
    }

    /// Takes the lock again if the folder was recreated, or if [`Self::is_alone`] has lost the lock. Does not wait.
    ///
    /// # Errors
    ///
    /// [`Error::File`] while there is no folder, or during an uninstallation.
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

    /// Whether no other agent has the shared lock. The check may lose this agent's lock to an uninstallation that begins at
    /// the same moment; [`Self::follow`] takes it again. Does not wait.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the folder can't be locked, or the lock is lost.
    pub fn is_alone(&mut self) -> Result<bool, Error> {
        // A failed upgrade loses the shared lock.
        let alone = flock(&self.folder, FlockOperation::NonBlockingLockExclusive).is_ok();
        let shared = flock(&self.folder, FlockOperation::NonBlockingLockShared);
        self.shared = shared.is_ok();
        shared.map(|()| alone).map_err(|error| failed(&self.bpffs, error.into()))
    }
}

// === impl AttachLock ===

impl AttachLock {
    /// Takes the lock; `None` while another agent has it.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the folder can't be created or locked; [`Error::NewerLayout`].
    pub fn take(bpffs: &Path) -> Result<Option<Self>, Error> {
        let (pins, _) = pins::open(bpffs)?;
        match lock(&pins, FlockOperation::NonBlockingLockExclusive) {
            Ok(folder) => Ok(Some(Self(folder))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(source) => Err(failed(&pins, source)),
        }
    }

    /// Waits for the lock, so that of two agents that start at once, the second finds the first; `None` if another agent
    /// has it for so long that it may hang.
    ///
    /// # Errors
    ///
    /// As [`Self::take`].
    pub async fn wait(bpffs: &Path) -> Result<Option<Self>, Error> {
        let began = Instant::now();
        let mut warned = false;
        while began.elapsed() < LIMIT {
            if let Some(lock) = Self::take(bpffs)? {
                return Ok(Some(lock));
            }
            if !warned {
                info!("Another agent starts; waiting until it serves");
                warned = true;
            }
            sleep(RETRY).await;
        }
        warn!("Another agent starts and does not come to serve; going on without the attach lock");
        Ok(None)
    }
}

// === impl Patience ===

impl Patience {
    /// Whether drift must no longer be left to the other agent. The first call starts the time.
    pub(crate) fn is_over(&mut self) -> bool {
        self.0.get_or_insert_with(Instant::now).elapsed() >= PATIENCE
    }

    /// Ends the wait: there is no drift, or the other agent does not have the lock.
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
        let agents = [AgentLock::share(path).unwrap(), AgentLock::share(path).unwrap()];
        for agent in agents {
            assert!(lock_for_uninstall(path).unwrap().is_none());
            drop(agent);
        }
        let held = lock_for_uninstall(path).unwrap().unwrap();
        assert!(lock(path, FlockOperation::NonBlockingLockShared).is_err());
        drop(held);
        drop(AgentLock::share(path).unwrap());
        assert!(lock_for_uninstall(&path.join("nothing")).unwrap().is_some());
    }

    #[test]
    fn an_agent_is_alone_while_no_other_has_a_share_of_the_folder_that_is_there() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("kiam");
        fs::create_dir(&path).unwrap();
        let mut agent = AgentLock::share(&path).unwrap();
        assert!(agent.is_alone().unwrap());
        let other = AgentLock::share(&path).unwrap();
        assert!(!agent.is_alone().unwrap());
        assert!(lock_for_uninstall(&path).unwrap().is_none(), "both shares are still there");
        drop(other);
        assert!(agent.is_alone().unwrap());
        // Somebody removes the folder; until the agent follows, nobody sees it.
        fs::rename(&path, above.path().join("old")).unwrap();
        assert!(agent.follow().is_err());
        fs::create_dir(&path).unwrap();
        assert!(lock_for_uninstall(&path).unwrap().is_some());
        agent.follow().unwrap();
        assert!(lock_for_uninstall(&path).unwrap().is_none());
    }

    #[test]
    fn an_uninstallation_that_hangs_keeps_no_agent_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let mut agent = AgentLock::share(path).unwrap();
        // It got its lock in the instant in which the agent had none.
        flock(&agent.folder, FlockOperation::Unlock).unwrap();
        let held = lock_for_uninstall(path).unwrap().unwrap();
        assert!(agent.is_alone().is_err());
        assert!(agent.follow().is_err());
        drop(held);
        agent.follow().unwrap();
        assert!(lock_for_uninstall(path).unwrap().is_none());
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

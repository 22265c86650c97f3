//! What an agent left in the kernel, in a form that is cheaply compared: full checks read each pin.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{Interception, open_pins::AttachedLink};
use crate::{error::Error, sys::Cgroup};

/// The programs, pins and cgroup of an agent, as they were at one moment.
#[derive(Debug)]
pub struct Snapshot {
    cgroup: Cgroup,
    links: Vec<AttachedLink>,
    /// The folder of the pins, and the one above it.
    folders: [(PathBuf, FolderState); 2],
}

/// The identity of a folder, and when its entries were last changed. A change within the same tick of the kernel's clock, some
/// milliseconds, does not show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FolderState {
    folder: (u64, u64),
    changed: (i64, i64),
}

// === impl Interception ===

impl Interception {
    /// The present state. Taken before [`Self::drift`] finds nothing, it shows everything that happens afterwards.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn snapshot(&self) -> Result<Snapshot, Error> {
        let above = self.pins.parent().unwrap_or(&self.pins);
        let state = |path: &Path| {
            let failed = |source| Error::File { what: "read", path: path.to_owned(), source };
            let state = FolderState::of(path).map_err(failed)?;
            Ok::<_, Error>((path.to_owned(), state))
        };
        Ok(Snapshot {
            cgroup: self.cgroup.clone(),
            links: self.open_pins.attached(&self.programs, &self.pins)?,
            folders: [state(&self.pins)?, state(above)?],
        })
    }
}

// === impl Snapshot ===

impl Snapshot {
    /// The pods' cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// Whether everything is as it was: the cgroup is there, each link has its program and is attached to the cgroup, and no
    /// pin has come or gone.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.cgroup.is_there()
            && self.links.iter().all(|link| link.is_at(self.cgroup.id()))
            && self.folders.iter().all(|(path, state)| FolderState::of(path).ok() == Some(*state))
    }
}

// === impl FolderState ===

impl FolderState {
    fn of(path: &Path) -> io::Result<Self> {
        let folder = fs::metadata(path)?;
        Ok(Self {
            folder: (folder.dev(), folder.ino()),
            changed: (folder.mtime(), folder.mtime_nsec()),
        })
    }
}

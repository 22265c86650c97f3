//! Detaches the kernel programs and removes everything that agents have set in the kernel.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::last_renewed;
use crate::{
    error::Error,
    guard,
    pins::{self, UninstallLock, lock_for_uninstall},
    sys::links::PinnedLink,
};

/// An agent renews its lease every second. One that has not done so for this long hangs.
const HUNG: Duration = Duration::from_secs(5);

/// What an uninstallation removed.
#[derive(Debug)]
pub struct Removal {
    /// Links, maps, folders, rules and filters.
    pub removed: Vec<String>,
    /// Keeps agents from starting until it is dropped; `None` where an agent hangs, or starts.
    pub lock: Option<UninstallLock>,
}

/// Why nothing was uninstalled.
#[derive(Debug, thiserror::Error)]
pub enum UninstallError {
    /// An agent runs, and `--force` was not given.
    #[error(
        "an agent runs on this node, with pins below {}: end it first, or give --force if it hangs", .0.display()
    )]
    InUse(PathBuf),
    /// The agent that `--force` is to override does not hang.
    #[error(
        "an agent runs on this node, with pins below {}, and was last heard from {} ms ago: it would reattach everything at once; end it first (--force overrides an agent that has hung for {} s)",
        .bpffs.display(), .age.as_millis(), HUNG.as_secs()
    )]
    Alive {
        /// The folder of the pins.
        bpffs: PathBuf,
        /// How long ago it renewed its lease.
        age: Duration,
    },
    /// Something can't be removed.
    #[error(transparent)]
    Kernel(#[from] Error),
}

/// Whether any agent has pins below `bpffs`.
#[must_use]
pub fn is_installed(bpffs: &Path) -> bool {
    pins::layouts(bpffs).is_ok_and(|folders| !folders.is_empty())
}

/// Removes what agents have set in the kernel and pinned below `bpffs`, and the units of the `boot_guard` folder. An agent
/// that runs keeps all of it, unless that agent hangs and this is done by `force`.
///
/// # Errors
///
/// [`UninstallError::InUse`] and [`UninstallError::Alive`] while an agent runs; the first thing that can't be removed.
pub fn remove_all(
    bpffs: &Path,
    boot_guard: Option<&Path>,
    force: bool,
) -> Result<Removal, UninstallError> {
    let lock = lock_for_uninstall(bpffs)?;
    if lock.is_none() {
        if !force {
            return Err(UninstallError::InUse(bpffs.to_owned()));
        }
        if let Some(age) = last_renewed(bpffs).filter(|age| *age < HUNG) {
            return Err(UninstallError::Alive { bpffs: bpffs.to_owned(), age });
        }
    }
    detach(bpffs)?;
    // Before the rules that it sets: a boot meanwhile would bring them back.
    let removed = boot_guard.map(guard::remove_boot_guard).transpose().map_err(Error::from)?;
    let mut removed = removed.unwrap_or_default();
    removed.extend(uninstall(bpffs)?);
    // The lock on the folder shows others an agent that hangs; others' pins keep it too, and so does a mount.
    if lock.is_some() && fs::remove_dir(bpffs).is_ok() {
        removed.push(bpffs.display().to_string());
    }
    Ok(Removal { removed, lock })
}

/// Detaches every link below `bpffs`, of every layout, and leaves the pins. It is for a hung agent, before [`uninstall`]:
/// links that the agent holds open would stay attached without pins. A live agent restores them.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Bpf`] for the first link that can't be detached.
pub fn detach(bpffs: &Path) -> Result<(), Error> {
    for (_, folder) in pins::layouts(bpffs)? {
        for pin in pins::links(&folder)? {
            if let Some(link) = PinnedLink::open(&pin)? {
                link.detach(&pin)?;
            }
        }
    }
    Ok(())
}

/// Removes the pins below `bpffs`, of every layout: links first, which detaches programs that no agent holds open, then
/// maps, then folders. Then removes the guard's routing rules and filters. Returns what it removed. A clean node is no
/// error.
///
/// # Errors
///
/// [`Error::File`] or [`Error::Guard`] for the first that can't be removed.
pub fn uninstall(bpffs: &Path) -> Result<Vec<String>, Error> {
    let folders = pins::layouts(bpffs)?.into_iter().map(|(_, folder)| folder).collect();
    let pins = pins::remove(folders)?;
    let mut removed: Vec<String> = pins.iter().map(|path| path.display().to_string()).collect();
    removed.extend(guard::uninstall()?);
    Ok(removed)
}

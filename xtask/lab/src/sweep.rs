//! Names of what outlives a process (cgroups, bpffs mounts) and the removal of what a killed run left.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::Result;
use rustix::mount::{UnmountFlags, unmount};

use super::cgroup;

const PREFIX: &str = "kiam-lab-";

/// A name that no other lab has: `kiam-lab-<pid>-<n>`.
pub(super) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The lab's own folder for mounts and state.
pub(super) fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(name)
}

/// Removes what processes that are gone have left; once per process.
pub(super) fn leftovers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = sweep() {
            eprintln!("lab: what an earlier run left can't be removed: {error:#}");
        }
    });
}

/// Unmounts the bpffs, which frees the pinned links, and removes the folder.
pub(super) fn remove_folder(folder: &Path) -> Result<()> {
    let bpffs = folder.join("bpf");
    if bpffs.exists() {
        // Not mounted is fine: the run may have ended before it was.
        let _ = unmount(&bpffs, UnmountFlags::DETACH);
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn sweep() -> Result<()> {
    for folder in orphans(&std::env::temp_dir())? {
        remove_folder(&folder)?;
    }
    for group in orphans(&cgroup::mount_point()?)? {
        cgroup::remove_tree(&group)?;
    }
    Ok(())
}

/// The entries of `dir` that bear our prefix and a process id that no process has.
fn orphans(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if owner(&entry.file_name().to_string_lossy()).is_some_and(is_gone) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn owner(name: &str) -> Option<u32> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn is_gone(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_of_processes_that_are_gone_are_orphans() {
        let dir = tempfile::tempdir().unwrap();
        let ours = unique_name();
        // Above the kernel's largest process id, 2^22.
        let gone = format!("{PREFIX}99999999-0");
        for name in [ours.as_str(), gone.as_str(), "kubepods.slice", "kiam-lab-x-0"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(orphans(dir.path()).unwrap(), [dir.path().join(gone)]);
    }
}

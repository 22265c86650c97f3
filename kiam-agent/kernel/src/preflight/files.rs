//! The folders that the agent writes to.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, StatVfsMountFlags, access, statvfs};

use super::Config;
use crate::{guard, pins};
use kiam_core::preflight::{
    Check,
    Topic::{self, BootGuard, Bpffs, StateDir},
};

pub(super) fn checks(node: &Config) -> Vec<Check> {
    let mut checks = vec![state_dir(node)];
    let Some(config) = &node.intercept else { return checks };
    checks.push(bpffs(&node.bpffs));
    checks.extend(config.boot_guard.as_deref().map(boot_guard));
    checks
}

fn bpffs(path: &Path) -> Check {
    let older = match pins::check(path) {
        Ok(older) => older,
        Err(error) => {
            let otherwise = "mount a BPF file system on the node: mount -t bpf bpf /sys/fs/bpf";
            return Check::failed(Bpffs, &error, otherwise);
        }
    };
    if let Some(problem) = unwritable(Bpffs, "--bpffs", path) {
        return problem;
    }
    let shown = path.display();
    let current = pins::current(path);
    let pinned = |folder: &PathBuf| pins::links(folder).is_ok_and(|links| !links.is_empty());
    match (older.iter().chain([&current]).any(pinned), older.len()) {
        (false, _) => Check::ok(Bpffs, format!("{shown} can be written, and has no pins yet")),
        (true, 0) => Check::ok(
            Bpffs,
            format!("{shown} can be written, and has an agent's programs, which are replaced"),
        ),
        (true, _) => Check::ok(
            Bpffs,
            format!("{shown} can be written, and has pins of an older layout, which are adopted"),
        ),
    }
}

fn state_dir(node: &Config) -> Check {
    let path = &node.state_dir;
    unwritable(StateDir, "--state-dir", path)
        .unwrap_or_else(|| Check::ok(StateDir, format!("{} can be written", path.display())))
}

fn boot_guard(path: &Path) -> Check {
    if let Err(error) = guard::check_boot_guard(path) {
        return Check::failed(BootGuard, &error, "mount the node's /etc/systemd/system there");
    }
    let good = || Check::ok(BootGuard, format!("{} can be written", path.display()));
    unwritable(BootGuard, "--boot-guard", path).unwrap_or_else(good)
}

/// A failure, if the folder at `path`, or the nearest one that exists, can't be written. Nothing is written to find out.
fn unwritable(topic: Topic, flag: &str, path: &Path) -> Option<Check> {
    let nearest = path.ancestors().find(|folder| folder.exists()).unwrap_or(path);
    let read_only =
        statvfs(nearest).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY));
    let problem = match access(nearest, Access::WRITE_OK) {
        _ if read_only => "it is mounted read-only".to_owned(),
        Err(error) => io::Error::from(error).to_string(),
        Ok(()) if !nearest.is_dir() => "it is no folder".to_owned(),
        Ok(()) => return None,
    };
    Some(Check::fail(
        topic,
        format!("{flag} {}: {} can't be written: {problem}", path.display(), nearest.display()),
        format!("mount a folder of the node there that root can write, or choose another {flag}"),
    ))
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict;

    use super::*;

    #[test]
    fn the_nearest_folder_that_exists_is_judged() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("a/b");
        assert_eq!(unwritable(StateDir, "--state-dir", &below), None);
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        for (path, says) in
            [(file.join("a"), "no folder"), ("/proc/sys/kernel/a".into(), "/proc/sys/kernel")]
        {
            let Some(check) = unwritable(StateDir, "--state-dir", &path) else { continue };
            assert_eq!(check.verdict, Verdict::Fail);
            assert!(check.finding.contains(says), "{}", check.finding);
        }
        assert!(unwritable(StateDir, "--state-dir", &file.join("a")).is_some());
    }

    #[test]
    fn a_folder_that_is_no_bpffs_is_a_failure_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let check = bpffs(&folder.path().join("kiam"));
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.finding.ends_with("is not on a BPF file system"), "{}", check.finding);
        assert_eq!(check.remedy.as_deref(), Some("mount one: mount -t bpf bpf /sys/fs/bpf"));
    }
}

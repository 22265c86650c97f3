//! Cgroups of our own below the cgroup2 mount, laid out as the kubelet does.

use std::{
    fs, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::{
    io::Errno,
    process::{Pid, Signal, kill_process},
};

/// How long the kernel is given to let go of killed processes.
const EMPTY_TRIES: u32 = 200;
const EMPTY_PAUSE: Duration = Duration::from_millis(10);

/// Where the kubelet puts a pod's containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// systemd driver, QoS burstable: `kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/…`.
    #[default]
    SystemdBurstable,
    /// systemd driver, QoS guaranteed: no QoS folder.
    SystemdGuaranteed,
    /// cgroupfs driver, QoS burstable: `burstable/pod<uid>/<container id>`.
    CgroupfsBurstable,
}

/// A cgroup that this process made, mostly. Drop kills what runs in it and removes it, with all below it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// It stays.
    others: bool,
}

// === impl Layout ===

impl Layout {
    /// The container's cgroup, relative to the pods' one.
    #[must_use]
    pub fn container(self, pod_uid: &str, container_id: &str) -> PathBuf {
        let uid = pod_uid.replace('-', "_");
        match self {
            Self::SystemdBurstable => format!(
                "kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice/cri-containerd-{container_id}.scope"
            ),
            Self::SystemdGuaranteed => {
                format!("kubepods-pod{uid}.slice/cri-containerd-{container_id}.scope")
            }
            Self::CgroupfsBurstable => format!("burstable/pod{pod_uid}/{container_id}"),
        }
        .into()
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// Makes the cgroup `path`, and those above it that are missing.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).with_context(|| format!("making cgroup {}", path.display()))?;
        Ok(Self { path, others: false })
    }

    /// The cgroup `path` of somebody else, which Drop leaves alone.
    #[must_use]
    pub fn of_others(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), others: true }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, as `bpf_get_current_cgroup_id()` says it: the directory's inode.
    pub fn id(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(fs::metadata(&self.path).context("reading a cgroup's id")?.ino())
    }

    /// Makes `command` start in this cgroup.
    pub fn adopt(&self, command: &mut Command) -> Result<()> {
        join(&self.path, command)
    }

    /// Kills every process in it and below.
    pub fn kill(&self) -> Result<()> {
        kill(&self.path)
    }
}

/// Makes `command` start in the cgroup `path`.
pub(super) fn join(path: &Path, command: &mut Command) -> Result<()> {
    let procs = fs::File::options()
        .write(true)
        .open(path.join("cgroup.procs"))
        .with_context(|| format!("opening {}/cgroup.procs", path.display()))?;
    // "0" is the writer itself.
    let join = move || rustix::io::write(&procs, b"0").map(drop).map_err(io::Error::from);
    // SAFETY: between fork and exec, write(2) is one system call: no allocation, no lock.
    unsafe { command.pre_exec(join) };
    Ok(())
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if !self.others
            && let Err(error) = remove_tree(&self.path)
        {
            eprintln!("lab: {error:#}");
        }
    }
}

/// The cgroup2 mount, `/sys/fs/cgroup` or, on hybrid systems, `/sys/fs/cgroup/unified`.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(path))
        })
        .next()
        .context("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// Kills what runs in `root` and removes it, innermost first; that it is gone already is fine.
pub(super) fn remove_tree(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    kill(root)?;
    for _ in 0..EMPTY_TRIES {
        match remove_dirs(root) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                thread::sleep(EMPTY_PAUSE);
            }
            other => return other.with_context(|| format!("removing {}", root.display())),
        }
    }
    bail!("cgroup {} stays busy", root.display())
}

/// By `cgroup.kill`, which kernel 5.14 has.
fn kill(cgroup: &Path) -> Result<()> {
    let at_once = cgroup.join("cgroup.kill");
    if at_once.exists() { fs::write(at_once, "1") } else { kill_each(cgroup) }
        .with_context(|| format!("killing what runs in {}", cgroup.display()))
}

/// Frozen processes can't fork, and SIGKILL ends them all the same.
fn kill_each(cgroup: &Path) -> io::Result<()> {
    let freeze = cgroup.join("cgroup.freeze");
    fs::write(&freeze, "1")?;
    for _ in 0..EMPTY_TRIES {
        let mut processes = Vec::new();
        processes_below(cgroup, &mut processes)?;
        if processes.is_empty() {
            break;
        }
        for process in processes {
            match kill_process(process, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        thread::sleep(EMPTY_PAUSE);
    }
    fs::write(&freeze, "0")
}

fn processes_below(cgroup: &Path, found: &mut Vec<Pid>) -> io::Result<()> {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    found.extend(processes.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)));
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            processes_below(&entry.path(), found)?;
        }
    }
    Ok(())
}

fn remove_dirs(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn without_cgroup_kill_what_keeps_forking_ends_too() {
        if crate::skip!() {
            return;
        }
        let name = format!("kiam-kill-each-{}", std::process::id());
        let above = Cgroup::create(mount_point().unwrap().join(name)).unwrap();
        let below = Cgroup::create(above.path().join("below")).unwrap();
        let mut command = Command::new("sh");
        // Its number of processes stays the same, and their numbers do not.
        command.args(["-c", "(while :; do (exec sleep 0.01); done) & while :; do (:); done"]);
        below.adopt(&mut command).unwrap();
        let mut shell = command.spawn().unwrap();
        thread::sleep(Duration::from_millis(200));
        kill_each(above.path()).unwrap();
        let mut left = Vec::new();
        processes_below(above.path(), &mut left).unwrap();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(shell.wait().unwrap().signal(), Some(Signal::KILL.as_raw()));
        let frozen = fs::read_to_string(above.path().join("cgroup.freeze")).unwrap();
        assert_eq!(frozen.trim(), "0", "the cgroup can be used again");
    }

    #[test]
    fn layouts_are_the_kubelets() {
        let uid = "0a1b2c3d-0000-4000-8000-00000000000f";
        let cases = [
            (
                Layout::SystemdBurstable,
                "kubepods-burstable.slice/kubepods-burstable-pod0a1b2c3d_0000_4000_8000_00000000000f.slice/cri-containerd-c1.scope",
            ),
            (
                Layout::SystemdGuaranteed,
                "kubepods-pod0a1b2c3d_0000_4000_8000_00000000000f.slice/cri-containerd-c1.scope",
            ),
            (Layout::CgroupfsBurstable, "burstable/pod0a1b2c3d-0000-4000-8000-00000000000f/c1"),
        ];
        for (layout, path) in cases {
            assert_eq!(layout.container(uid, "c1"), PathBuf::from(path), "{layout:?}");
        }
    }
}

//! Finds a pod's network namespaces by the processes in its cgroup.

use std::{
    collections::{HashSet, VecDeque},
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags, open, openat},
    io::Errno,
};

use super::claims::Claims;
use crate::selftest;

/// The most namespaces of one pod that are considered: a container may create any number.
pub(super) const CANDIDATES: usize = 16;
/// The most cgroups of one pod that are searched, breadth first, and the depth that runtimes use: the pod's cgroup, its
/// containers', and in those an init system's or the runtime's.
const CGROUPS: usize = 256;
const DEPTH: usize = 3;
/// The most processes of one pod that are read in an ordinary scan.
pub(super) const MANY: usize = 4096;
/// The same in an urgent, real-time scan: a sandbox begins with one process.
pub(super) const FEW: usize = 64;
/// Attempts of a search during which processes end, in order to find processes that they started.
const TRIES: usize = 3;

/// The processes of a pod, and their network namespaces.
#[derive(Debug, Default)]
pub(super) struct Processes {
    /// Namespaces that are not claimed for the pod, oldest cgroup first, with their inode numbers.
    pub(super) others: Vec<(u64, File)>,
    /// The claimed namespaces that a process is in.
    pub(super) lived_in: HashSet<u64>,
    /// Whether there is a process.
    pub(super) any: bool,
    /// Whether a process is in the node's namespace.
    pub(super) on_node: bool,
    /// Whether a process is invisible in the agent's PID namespace.
    pub(super) hidden: bool,
    /// Why a running process's namespace can't be opened: a capability may be missing.
    pub(super) failure: Option<String>,
    /// Whether the search was complete.
    pub(super) complete: bool,
    /// Whether the pod may have processes that a complete search does not reach: deeper cgroups have some, or the kernel says
    /// that the pod has some and none was found. Only if a claimed namespace has no process.
    pub(super) unreached: bool,
}

/// A process with its open folder in /proc, which never leads to another process with the same number.
struct Process {
    pid: String,
    folder: File,
    inode: u64,
    namespace: File,
}

// === impl Processes ===

impl Processes {
    /// Reads up to `most` processes of the cgroup `pod` and below. `claimed` are the pod's namespaces.
    pub(super) fn of(pod: &Path, most: usize, claimed: &HashSet<u64>, claims: &Claims) -> Self {
        let mut found = Self::default();
        let mut deepest = Vec::new();
        for _ in 0..TRIES {
            found = Self { complete: true, ..Self::default() };
            deepest = found.search(pod, most, claimed, claims);
            if found.complete {
                break;
            }
        }
        if found.complete && found.lived_in.len() < claimed.len() {
            // A process may have moved between cgroups while they were read.
            found.unreached = have_processes_below(&deepest) || !found.any && is_populated(pod);
            found.any |= found.unreached;
        }
        found
    }

    /// Searches the cgroup `pod` and below, and returns the deepest cgroups.
    fn search(
        &mut self,
        pod: &Path,
        most: usize,
        claimed: &HashSet<u64>,
        claims: &Claims,
    ) -> Vec<PathBuf> {
        let mut deepest = Vec::new();
        let mut cgroups = VecDeque::from([(pod.to_owned(), 0)]);
        let (mut searched, mut processes) = (0, 0);
        while let Some((cgroup, depth)) = cgroups.pop_front() {
            searched += 1;
            processes += self.search_one(&cgroup, most - processes, claimed, claims);
            if searched == CGROUPS || processes == most {
                self.complete = false;
                break;
            }
            if depth < DEPTH {
                let below = self.known(below(&cgroup));
                cgroups.extend(below.into_iter().map(|path| (path, depth + 1)));
            } else {
                deepest.push(cgroup);
            }
        }
        deepest
    }

    /// Reads up to `most` processes of `cgroup`, and returns their number.
    fn search_one(
        &mut self,
        cgroup: &Path,
        most: usize,
        claimed: &HashSet<u64>,
        claims: &Claims,
    ) -> usize {
        let pids = self.known(members(cgroup));
        let mut unsure = Vec::new();
        for pid in pids.iter().take(most) {
            self.any = true;
            // The process has no number in the agent's PID namespace, or it has just ended.
            if pid == "0" {
                self.hidden = true;
                self.complete = false;
                continue;
            }
            let process = match Process::open(pid) {
                Ok(process) => process,
                Err(error) => {
                    self.complete = false;
                    if !has_ended(&error) {
                        self.failure = Some(error.to_string());
                    }
                    continue;
                }
            };
            if claims.is_nodes(process.inode) {
                self.on_node = true;
            } else if claimed.contains(&process.inode) {
                self.lived_in.insert(process.inode);
            } else if self.is_new(process.inode, &unsure) {
                unsure.push(process);
            }
        }
        self.confirm(cgroup, unsure);
        pids.len().min(most)
    }

    /// The content of a cgroup; nothing if it is gone. If it can't be read, the search is incomplete.
    fn known<T>(&mut self, read: io::Result<Vec<T>>) -> Vec<T> {
        read.unwrap_or_else(|error| {
            self.complete &= matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV));
            Vec::new()
        })
    }

    fn is_new(&self, inode: u64, unsure: &[Process]) -> bool {
        self.others.len() + unsure.len() < CANDIDATES
            && self.others.iter().all(|(known, _)| *known != inode)
            && unsure.iter().all(|process| process.inode != inode)
    }

    /// Adds the processes that are still in `cgroup`, since a process number may have been reused meanwhile.
    fn confirm(&mut self, cgroup: &Path, unsure: Vec<Process>) {
        if unsure.is_empty() {
            return;
        }
        let pids: HashSet<String> = self.known(members(cgroup)).into_iter().collect();
        for process in unsure {
            if pids.contains(&process.pid) && process.lives() {
                self.others.push((process.inode, process.namespace));
            } else {
                self.complete = false;
            }
        }
    }
}

// === impl Process ===

impl Process {
    fn open(pid: &str) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = File::from(open(format!("/proc/{pid}"), flags, Mode::empty())?);
        let namespace = at(&folder, "ns/net").or_else(|error| {
            // The first thread may have ended while others run.
            let threads = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
            let names = threads.filter_map(|thread| thread.file_name().into_string().ok());
            let mut open =
                names.filter_map(|thread| at(&folder, &format!("task/{thread}/ns/net")).ok());
            open.next().ok_or(error)
        })?;
        let inode = namespace.metadata()?.ino();
        Ok(Self { pid: pid.to_owned(), folder, inode, namespace })
    }

    fn lives(&self) -> bool {
        at(&self.folder, "stat").is_ok()
    }
}

fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

fn at(folder: &File, path: &str) -> io::Result<File> {
    Ok(openat(folder, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// Whether cgroups below `deepest`, which are not searched, have processes. So it is if there are too many to tell.
fn have_processes_below(deepest: &[PathBuf]) -> bool {
    let mut seen = 0;
    deepest.iter().any(|cgroup| {
        let below = match below(cgroup) {
            Ok(below) => below,
            Err(error) => return !is_gone(&error),
        };
        seen += below.len();
        seen >= CGROUPS || below.iter().any(|path| is_populated(path))
    })
}

/// Whether the kernel says that `cgroup` or one below it has processes. It does so in cgroup v2 alone.
fn is_populated(cgroup: &Path) -> bool {
    match fs::read_to_string(cgroup.join("cgroup.events")) {
        Ok(events) => events.lines().any(|line| line == "populated 1"),
        Err(error) => !is_gone(&error),
    }
}

/// Whether a cgroup's file could not be read because the cgroup is gone, or has no such file. After another error, such as too
/// many open files, what is there is not known.
fn is_gone(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    [Errno::NOENT, Errno::NODEV].iter().any(|gone| number == Some(gone.raw_os_error()))
}

/// The processes of one cgroup, limited to one more than are read.
fn members(cgroup: &Path) -> io::Result<Vec<String>> {
    let list = BufReader::new(File::open(cgroup.join("cgroup.procs"))?);
    list.lines().take(MANY + 1).collect()
}

/// The cgroups in `cgroup` without those of the self-test, oldest first: the kernel numbers them in order.
fn below(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(cgroup)?.flatten();
    let is_selftests =
        |name: &OsStr| name.as_encoded_bytes().starts_with(selftest::CGROUP_PREFIX.as_bytes());
    let folders = entries.filter(|entry| {
        entry.file_type().is_ok_and(|kind| kind.is_dir()) && !is_selftests(&entry.file_name())
    });
    let mut numbered: Vec<_> = folders
        .filter_map(|entry| Some((entry.metadata().ok()?.ino(), entry.path())))
        .take(CGROUPS)
        .collect();
    numbered.sort();
    Ok(numbered.into_iter().map(|(_, path)| path).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(members: &[(&str, String)]) -> tempfile::TempDir {
        let pod = tempfile::tempdir().unwrap();
        for (cgroup, pids) in members {
            let cgroup = pod.path().join(cgroup);
            fs::create_dir_all(&cgroup).unwrap();
            fs::write(cgroup.join("cgroup.procs"), pids).unwrap();
        }
        pod
    }

    fn of(pod: &tempfile::TempDir) -> Processes {
        Processes::of(pod.path(), MANY, &HashSet::new(), &Claims::new(Vec::new()).unwrap())
    }

    #[test]
    fn the_nodes_namespace_is_no_pods_and_what_is_out_of_sight_is_told() {
        let found = of(&pod(&[("1", format!("{}\n", std::process::id()))]));
        assert!(found.any && found.on_node && found.complete && !found.hidden);
        assert!(found.others.is_empty());
        let found = of(&pod(&[("1", "0\n".to_owned())]));
        assert!(found.any && found.hidden && !found.on_node);
        let found = of(&pod(&[("1", String::new())]));
        assert!(!found.any && found.complete);
    }

    #[test]
    fn a_search_is_not_complete_when_a_process_ended_or_there_are_too_many() {
        // Above the kernel's largest process id.
        assert!(!of(&pod(&[("1", "99999999\n".to_owned())])).complete);
        let own = format!("{}\n", std::process::id());
        assert!(!of(&pod(&[("1", own.repeat(MANY))])).complete);
        assert!(of(&pod(&[("1", own.repeat(100))])).complete);
        let names: Vec<String> = (0..CGROUPS).map(|n| n.to_string()).collect();
        let many: Vec<_> = names.iter().map(|name| (name.as_str(), String::new())).collect();
        assert!(!of(&pod(&many)).complete);
    }

    #[test]
    fn cgroups_deeper_than_runtimes_make_them_are_not_searched() {
        let own = format!("{}\n", std::process::id());
        assert!(of(&pod(&[("1/2/3", own.clone())])).any);
        assert!(!of(&pod(&[("1/2/3/4", own)])).any);
    }

    #[test]
    fn a_number_that_is_no_longer_of_the_cgroup_is_not_believed() {
        let pod = pod(&[("1", String::new())]);
        let cgroup = pod.path().join("1");
        let mut found = Processes { complete: true, ..Processes::default() };
        let own = std::process::id().to_string();
        found.confirm(&cgroup, vec![Process::open(&own).unwrap()]);
        assert!(found.others.is_empty() && !found.complete);
        fs::write(cgroup.join("cgroup.procs"), &own).unwrap();
        found.confirm(&cgroup, vec![Process::open(&own).unwrap()]);
        assert_eq!(found.others.len(), 1);
        // The folder is of a process that has ended, and the number is in the list.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().to_string();
        let ended = Process::open(&pid);
        child.wait().unwrap();
        fs::write(cgroup.join("cgroup.procs"), &pid).unwrap();
        if let Ok(ended) = ended {
            found.confirm(&cgroup, vec![ended]);
            assert_eq!(found.others.len(), 1);
        }
    }
}

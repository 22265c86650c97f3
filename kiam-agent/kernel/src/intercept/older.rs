//! Finds pods with processes that are older than the programs.
//!
//! No pod can fake an older process, and the process that a runtime keeps for a sandbox lives as long as the sandbox. So its
//! start time shows whether the pod ran before it was intercepted. Without one (CRI-O's `drop_infra_ctr`, or a pod with
//! `shareProcessNamespace` that ends it), a pod of which all processes started again later looks younger.

use std::{
    collections::{HashSet, VecDeque},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use kiam_common::CgroupMark;
use rustix::io::Errno;
use tokio::time::Instant;
use tracing::warn;

use super::{InterceptedSince, own_pod};
use crate::{
    error::Error,
    pins,
    sys::{Cgroup, Walk},
};
use kiam_core::{blocking::Blocking, pods::PodUid};

/// How long one round of a search may take, and in it one pod.
const TIME: Duration = Duration::from_secs(5);
const POD_TIME: Duration = Duration::from_secs(1);
/// Of one pod, what is searched, as in [`crate::sys::namespaces`]. Its first process is in its oldest cgroup but for the pod's
/// own, so that it is found at once where there is one.
const DEPTH: usize = 3;
const CGROUPS: usize = 64;
const PROCESSES: usize = 4096;
/// `USER_HZ`, which is the same on every architecture that the agent is built for.
const TICKS_PER_SECOND: u64 = 100;
/// What `cgroup.procs` has for a process that the agent's own process namespace has no number for.
const UNSEEN: &str = "0";

/// What a search for older pods has found. Static pods are named by their config hash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OlderPods {
    /// Pods with a process from before anything kept them from the real service.
    pub older: HashSet<PodUid>,
    /// Pods with a process from before the kernel programs, which routing rules kept from the real service if their packets
    /// pass the node's routing.
    pub routed: HashSet<PodUid>,
    /// Pods whose processes the agent can't read, or of which there are too many. One may be routed too.
    pub unknown: HashSet<PodUid>,
}

/// A search for pods that are older than the interception, which goes on where it stopped.
#[derive(Debug)]
pub struct OlderSearch {
    since: InterceptedSince,
    /// The pods' cgroups of which it is known what there is to know.
    settled: HashSet<u64>,
    found: OlderPods,
}

/// What one pod's processes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Age {
    /// When the oldest of those that were read has started.
    oldest: Option<Duration>,
    /// Whether all were read.
    whole: bool,
}

// === impl OlderSearch ===

impl OlderSearch {
    /// A search that has not begun.
    #[must_use]
    pub fn new(since: InterceptedSince) -> Self {
        Self { since, settled: HashSet::new(), found: OlderPods::default() }
    }

    /// What was found until now.
    #[must_use]
    pub fn found(&self) -> &OlderPods {
        &self.found
    }

    /// Searches on in `cgroup`, for some seconds; whether all pods were searched then. Agents' own pods, which have the node's
    /// credentials by right, are left out.
    ///
    /// # Errors
    ///
    /// The system's, where the pins can't be read.
    pub fn go_on(
        &mut self,
        blocking: &Blocking,
        cgroup: &Cgroup,
        bpffs: &Path,
    ) -> Result<bool, Error> {
        let (pins, _) = pins::open(bpffs)?;
        let marks = own_pod::marks(&pins);
        let is_agents = |id: u64| {
            let mark = marks.as_ref().and_then(|marks| marks.get(&id, 0).ok());
            mark.is_some_and(|mark| CgroupMark::Pass.is(mark)) || cgroup.own_pod() == Some(id)
        };
        let mut listing = Walk::new(blocking, TIME);
        let pods = listing.pods(cgroup.path());
        let searched = self.round(blocking, cgroup.path(), (pods, is_agents), TIME);
        Ok(match searched {
            // The next listing leaves out the same.
            Some(0) if listing.is_cut() => {
                warn!(
                    "The node has more pods' cgroups than can be listed: some may hold the node's credentials and are not reported"
                );
                true
            }
            Some(_) => !listing.is_cut(),
            None => false,
        })
    }

    /// Searches those of `pods` that are not settled, for `time`, and at least one; how many, or `None` where some are left.
    fn round(
        &mut self,
        blocking: &Blocking,
        root: &Path,
        (pods, is_agents): (Vec<PathBuf>, impl Fn(u64) -> bool),
        time: Duration,
    ) -> Option<usize> {
        let until = Instant::now() + time;
        let mut searched = 0;
        for pod in pods {
            let uid = pod.strip_prefix(root).ok().and_then(PodUid::from_cgroup_path);
            let id = fs::metadata(&pod).map(|pod| pod.ino());
            // One that is gone has no process.
            let Some((uid, id)) = uid.zip(id.ok()) else { continue };
            if self.settled.contains(&id) || is_agents(id) {
                continue;
            }
            if searched > 0 && Instant::now() >= until {
                return None;
            }
            let age = Age::of(&mut Walk::new(blocking, POD_TIME), &pod, self.since.routing);
            self.settle(uid, age);
            self.settled.insert(id);
            searched += 1;
        }
        Some(searched)
    }

    fn settle(&mut self, pod: PodUid, age: Age) {
        let started_before = |since| age.oldest.is_some_and(|oldest| oldest <= since);
        if started_before(self.since.routing) {
            self.found.older.insert(pod);
            return;
        }
        if started_before(self.since.programs) {
            self.found.routed.insert(pod.clone());
        }
        if !age.whole {
            self.found.unknown.insert(pod);
        }
    }
}

// === impl Age ===

impl Age {
    /// Of the pod with the cgroup `pod`. Nothing more is read once a process is as old as `since`.
    fn of(walk: &mut Walk<'_>, pod: &Path, since: Duration) -> Self {
        let mut cgroups = VecDeque::from([(pod.to_owned(), 0)]);
        let (mut searched, mut left) = (0, PROCESSES);
        let mut age = Self { oldest: None, whole: true };
        while let Some((cgroup, depth)) = cgroups.pop_front() {
            searched += 1;
            if searched > CGROUPS || walk.is_over() {
                age.whole = false;
                break;
            }
            age.read(walk, &cgroup, &mut left);
            if age.oldest.is_some_and(|oldest| oldest <= since) {
                break;
            }
            let children = age.listed(walk.children(&cgroup, CGROUPS + 1));
            match depth == DEPTH {
                true => age.whole &= children.is_empty(),
                false => cgroups.extend(children.into_iter().map(|path| (path, depth + 1))),
            }
        }
        // Whatever was left out, for whichever reason.
        age.whole &= !walk.is_cut();
        age
    }

    /// Reads the processes of one cgroup, of which so many are `left` to be read.
    fn read(&mut self, walk: &mut Walk<'_>, cgroup: &Path, left: &mut usize) {
        let processes = self.listed(walk.members(cgroup, *left + 1));
        self.whole &= processes.len() <= *left;
        *left = left.saturating_sub(processes.len());
        let mut unread = Vec::new();
        for process in processes {
            match started(&process) {
                Some(started) => {
                    self.oldest =
                        Some(self.oldest.map_or(started, |oldest: Duration| oldest.min(started)));
                }
                None => unread.push(process),
            }
        }
        // One that has ended is not in the cgroup any more.
        if !unread.is_empty() {
            let there = self.listed(walk.members(cgroup, PROCESSES));
            let stays = |process: &String| process == UNSEEN || started(process).is_none();
            self.whole &= !there.iter().any(|process| unread.contains(process) && stays(process));
        }
    }

    /// What was listed of a cgroup; one that is gone has nothing.
    fn listed<T>(&mut self, listed: io::Result<Vec<T>>) -> Vec<T> {
        listed.unwrap_or_else(|error| {
            let errno = Errno::from_io_error(&error);
            self.whole &= matches!(errno, Some(Errno::NOENT | Errno::NODEV));
            Vec::new()
        })
    }
}

/// When the process started, since the node booted, rounded down to a tick. `None`: it has ended, or the agent can't read it.
fn started(pid: &str) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    start_time(&stat)
}

/// Field 22 of `/proc/<pid>/stat`. The second field is the program's name in parentheses, which may have any characters.
pub(crate) fn start_time(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some(Duration::from_millis(ticks.checked_mul(1000 / TICKS_PER_SECOND)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::since_boot;

    const LATER: Duration = Duration::from_secs(1 << 40);

    /// A pods' cgroup in which each pod has one container with these lines in its `cgroup.procs`.
    fn tree(pods: &[(PodUid, String)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (uid, processes) in pods {
            let container = root.path().join(format!("burstable/pod{uid}/1"));
            fs::create_dir_all(&container).unwrap();
            fs::write(container.join("cgroup.procs"), processes).unwrap();
        }
        root
    }

    fn uid(number: usize) -> PodUid {
        PodUid::new(&format!("{number:08x}-d9cb-469f-a165-70867728950e"))
    }

    fn list(root: &Path) -> Vec<PathBuf> {
        Walk::new(&Blocking::here().unwrap(), TIME).pods(root)
    }

    fn search(root: &Path, since: InterceptedSince) -> OlderPods {
        let mut search = OlderSearch::new(since);
        let pods = list(root);
        let count = pods.len();
        let blocking = Blocking::here().unwrap();
        assert_eq!(search.round(&blocking, root, (pods, |_| false), LATER), Some(count));
        search.found
    }

    #[test]
    fn a_programs_name_does_not_change_its_age() {
        let stat = "7 (a) S 1 2 3) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4211 9 10 18446744073709551615";
        assert_eq!(start_time(stat), Some(Duration::from_millis(42_110)));
        assert_eq!(start_time("7 (a) R 1"), None);
        let own = started("self").unwrap();
        let now = since_boot();
        assert!(own <= now && now - own < Duration::from_secs(3600), "{own:?} {now:?}");
    }

    #[test]
    fn pods_are_older_routed_or_unknown_and_what_can_not_be_read_is_not_younger() {
        let own = std::process::id().to_string();
        let many = format!("{own}\n").repeat(PROCESSES + 1);
        // No process has as large a number.
        let processes = [own.clone(), "0".into(), "99999999".into(), format!("0\n{own}"), many];
        let pods: Vec<_> =
            processes.into_iter().enumerate().map(|(n, text)| (uid(n), text)).collect();
        let root = tree(&pods);
        // As where the kernel does not let the agent read it.
        let unreadable = root.path().join(format!("burstable/pod{}/1/cgroup.procs", uid(5)));
        fs::create_dir_all(unreadable).unwrap();
        let start = started("self").unwrap();
        let (before, after) = (start - Duration::from_millis(10), start);
        let uids = |numbers: &[usize]| numbers.iter().map(|&number| uid(number)).collect();
        let younger = InterceptedSince { programs: before, routing: before };
        let found = search(root.path(), younger);
        let expected = OlderPods { unknown: uids(&[1, 2, 3, 4, 5]), ..OlderPods::default() };
        assert_eq!(found, expected);
        let routed = InterceptedSince { programs: after, routing: before };
        let expected = OlderPods { routed: uids(&[0, 3, 4]), ..expected };
        assert_eq!(search(root.path(), routed), expected);
        let older = InterceptedSince { programs: after, routing: after };
        let (older_pods, unknown) = (uids(&[0, 3, 4]), uids(&[1, 2, 5]));
        let expected = OlderPods { older: older_pods, unknown, ..OlderPods::default() };
        assert_eq!(search(root.path(), older), expected);
    }

    #[test]
    fn a_search_that_is_cut_short_goes_on_where_it_stopped_and_ends() {
        let own = std::process::id().to_string();
        let pods: Vec<_> = (0..20).map(|number| (uid(number), own.clone())).collect();
        let root = tree(&pods);
        let since = InterceptedSince { programs: since_boot(), routing: since_boot() };
        let mut search = OlderSearch::new(since);
        let blocking = Blocking::here().unwrap();
        let mut rounds = 0;
        loop {
            rounds += 1;
            let pods = list(root.path());
            if search.round(&blocking, root.path(), (pods, |_| false), Duration::ZERO).is_some() {
                break;
            }
            assert_eq!(search.settled.len(), rounds, "one more each time");
            assert!(rounds < 20, "it does not end");
        }
        assert_eq!((rounds, search.found.older.len()), (20, 20));
    }

    #[test]
    fn pods_and_processes_that_are_gone_are_not_unknown() {
        let blocking = Blocking::here().unwrap();
        let mut walk = Walk::new(&blocking, TIME);
        let gone = Age { oldest: None, whole: true };
        assert_eq!(Age::of(&mut walk, Path::new("/proc/nowhere"), Duration::ZERO), gone);
    }
}

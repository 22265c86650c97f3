//! Finds pods with processes that are older than the programs.
//!
//! No pod can fake an older process, and a pod's first process, which holds its namespaces, lives as long as the pod. So
//! its start time shows whether the pod ran before it was intercepted.

use std::{
    collections::{HashSet, VecDeque},
    fs,
    path::Path,
    time::Duration,
};

use kiam_common::CGROUP_PASS;

use super::own_pod;
use crate::{
    error::Error,
    pins,
    sys::{Cgroup, Walk},
};
use kiam_core::{blocking::Blocking, pods::PodUid};

/// The longest search.
const TIME: Duration = Duration::from_secs(5);
/// The part of one pod that is searched, as in [`crate::sys::namespaces`]. The first process is in the oldest cgroup below
/// the pod's own, so that it is found at once.
const DEPTH: usize = 3;
const CGROUPS: usize = 64;
const PROCESSES: usize = 4096;
/// `USER_HZ`, which is the same on every architecture that the agent is built for.
const TICKS_PER_SECOND: u64 = 100;

/// The result of a search for older pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OlderPods {
    /// The pods that have, or may have, such a process. Static pods are named by their config hash.
    pub pods: HashSet<PodUid>,
    /// Whether all pods were searched.
    pub complete: bool,
}

/// Whether one pod has an older process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Age {
    Older,
    Younger,
    /// The pod has more processes or cgroups than its share of the search.
    Unknown,
}

/// Finds the pods in `cgroup` that have a process from before `since`, a time since the node booted. Agents' own pods are
/// left out, as they may have the node's credentials. A pod that can't be searched in reasonable time is included.
///
/// # Errors
///
/// The system's, if the pins can't be read.
pub fn older_pods(
    blocking: &Blocking,
    cgroup: &Cgroup,
    bpffs: &Path,
    since: Duration,
) -> Result<OlderPods, Error> {
    let (pins, _) = pins::open(bpffs)?;
    let marks = own_pod::marks(&pins);
    let is_agents = |pod: &Path| {
        let id = fs::metadata(pod).map(|pod| std::os::unix::fs::MetadataExt::ino(&pod));
        id.is_ok_and(|id| {
            let mark = marks.as_ref().and_then(|marks| marks.get(&id, 0).ok());
            mark == Some(CGROUP_PASS) || cgroup.own_pod() == Some(id)
        })
    };
    let mut walk = Walk::new(blocking, TIME);
    let mut found = OlderPods { pods: HashSet::new(), complete: true };
    for pod in walk.pods(cgroup.path()) {
        let below = pod.strip_prefix(cgroup.path()).ok();
        let Some(uid) = below.and_then(PodUid::from_cgroup_path) else { continue };
        if is_agents(&pod) {
            continue;
        }
        let age = age(&mut walk, &pod, since);
        if walk.is_over() {
            found.complete = false;
            break;
        }
        if age != Age::Younger {
            found.pods.insert(uid);
        }
    }
    Ok(found)
}

fn age(walk: &mut Walk<'_>, pod: &Path, since: Duration) -> Age {
    let mut cgroups = VecDeque::from([(pod.to_owned(), 0)]);
    let (mut searched, mut left, mut whole) = (0, PROCESSES, true);
    while let Some((cgroup, depth)) = cgroups.pop_front() {
        searched += 1;
        if searched > CGROUPS {
            return Age::Unknown;
        }
        let processes = walk.members(&cgroup, left + 1).unwrap_or_default();
        whole &= processes.len() <= left;
        left = left.saturating_sub(processes.len());
        if processes.iter().any(|pid| started(pid).is_some_and(|started| started <= since)) {
            return Age::Older;
        }
        let children = walk.children(&cgroup, CGROUPS + 1).unwrap_or_default();
        match depth == DEPTH {
            true => whole &= children.is_empty(),
            false => cgroups.extend(children.into_iter().map(|path| (path, depth + 1))),
        }
    }
    if whole { Age::Younger } else { Age::Unknown }
}

/// The process's start time since the node booted, rounded down to a tick; `None` if it has ended or the agent can't see it.
fn started(pid: &str) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    start_time(&stat)
}

/// Field 22 of `/proc/<pid>/stat`. The second field is the program's name in parentheses, which may have any characters.
fn start_time(stat: &str) -> Option<Duration> {
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks: u64 = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some(Duration::from_millis(ticks.checked_mul(1000 / TICKS_PER_SECOND)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_name_does_not_change_its_age() {
        let stat = "7 (a) S 1 2 3) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4211 9 10 18446744073709551615";
        assert_eq!(start_time(stat), Some(Duration::from_millis(42_110)));
        assert_eq!(start_time("7 (a) R 1"), None);
        let own = started("self").unwrap();
        let now = super::super::since_boot();
        assert!(own <= now && now - own < Duration::from_secs(3600), "{own:?} {now:?}");
    }
}

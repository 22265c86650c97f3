//! The pods' cgroup, and what is seen of pods there.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::inotify::{CreateFlags, WatchFlags, add_watch, init},
    io::Errno,
};

use super::{Config, counted, hooks, limits};
use crate::{
    error::Error,
    sys::{Cgroup, Walk, namespaces::of_pods},
};
use kiam_core::{
    blocking::Blocking,
    preflight::{
        Check,
        Topic::{Cgroup as PodsCgroup, Hooks, Processes},
    },
};

/// The longest search for pods' processes.
const TIME: Duration = Duration::from_secs(5);
/// The inode number of the machine's first PID namespace: `PROC_PID_INIT_INO` of `linux/proc_ns.h`.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";
/// The most pods whose cgroups are watched for a try.
const TRIED_PODS: usize = 512;

pub(super) fn checks(blocking: &Blocking, node: &Config) -> Vec<Check> {
    let Some(config) = &node.intercept else { return Vec::new() };
    let follows = config.follows_sandboxes();
    match Cgroup::open(blocking, config.cgroup.as_deref()) {
        Ok(cgroup) => {
            let pods = Walk::new(blocking, TIME).pods(cgroup.path());
            let mut checks = vec![found(&cgroup, pods.len()), hooks::check(&cgroup, config.guard)];
            if follows {
                checks.push(processes(blocking, &cgroup, pods.len()));
                checks.push(inotify(&cgroup, &pods));
            }
            checks
        }
        Err(error) => {
            let why = "the pods' cgroup is not known";
            let remedy = "see cgroup";
            let mut checks = vec![missing(&error), Check::unknown(Hooks, why, remedy)];
            if follows {
                checks.push(Check::unknown(Processes, why, remedy));
                checks.push(limits::inotify(&Ok(0)));
            }
            checks
        }
    }
}

fn found(cgroup: &Cgroup, pods: usize) -> Check {
    let pods = counted(pods, "pod");
    Check::ok(PodsCgroup, format!("{}, with {pods}", cgroup.path().display()))
}

fn missing(error: &Error) -> Check {
    let otherwise = "name the pods' cgroup with --cgroup";
    match error {
        // The agent waits for the first pod.
        Error::UnusedCgroups(_) => {
            let failed = Check::failed(PodsCgroup, error, otherwise);
            Check::warn(PodsCgroup, failed.finding, failed.remedy.unwrap_or_default())
        }
        Error::MixedCgroups { .. } => {
            let text = error.to_string();
            let (finding, remedy) = text.split_once(": ").unwrap_or((&text, otherwise));
            Check::fail(PodsCgroup, finding, remedy)
        }
        error => Check::failed(PodsCgroup, error, otherwise),
    }
}

/// Whether the processes of pods have numbers here. Those of the namespace that this process is in have.
fn processes(blocking: &Blocking, cgroup: &Cgroup, pods: usize) -> Check {
    let mut walk = Walk::new(blocking, TIME);
    let mut seen = 0_usize;
    let gaps = of_pods(&mut walk, cgroup.path(), |_| {
        seen += 1;
        std::ops::ControlFlow::Continue(())
    });
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    judge_processes(gaps.hidden, seen, pods, namespace == Path::new(FIRST_PID_NAMESPACE))
}

/// The verdict on `hidden` processes without a number and `seen` namespaces of `pods`. In the first PID namespace all have a
/// number, until they end: a list that is read meanwhile has a 0 for them.
fn judge_processes(hidden: usize, seen: usize, pods: usize, is_first: bool) -> Check {
    if hidden > 0 && !is_first {
        return Check::fail(
            Processes,
            format!(
                "{hidden} processes of pods can't be seen from here, so that the agent does not find their network namespaces, and denies them"
            ),
            "set hostPID: true for the agent's pod, as deploy/daemonset.yaml does",
        );
    }
    match (seen, is_first) {
        (0, false) => Check::unknown(
            Processes,
            format!(
                "there is no pod with a network of its own among {}, to try this",
                counted(pods, "pod")
            ),
            "set hostPID: true for the agent's pod, and repeat this when a pod runs here",
        ),
        (0, true) => Check::ok(Processes, "this is the machine's first PID namespace"),
        (_, _) => Check::ok(
            Processes,
            format!("the network namespaces of {} were found", counted(seen, "pod")),
        ),
    }
}

/// Watches what the agent would watch of these pods, and ends that.
fn inotify(cgroup: &Cgroup, pods: &[PathBuf]) -> Check {
    let tried = || -> io::Result<usize> {
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let pods = pods.iter().take(TRIED_PODS);
        let files = pods.flat_map(|pod| [pod.clone(), pod.join("cgroup.events")]);
        let mut watches = 0;
        for path in std::iter::once(cgroup.path().to_owned()).chain(files) {
            match add_watch(&inotify, &path, WatchFlags::CREATE) {
                Ok(_) => watches += 1,
                // The pod is gone.
                Err(Errno::NOENT | Errno::NODEV) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(watches)
    };
    limits::inotify(&tried())
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{Fail, Ok as Good, Unknown, Warn};

    use super::*;

    #[test]
    fn processes_without_a_number_fail_only_where_all_that_live_have_none() {
        for (hidden, seen, is_first, verdict) in [
            (1, 0, false, Fail),
            (1, 2, false, Fail),
            (1, 2, true, Good),
            (3, 0, true, Good),
            (0, 2, false, Good),
            (0, 0, false, Unknown),
        ] {
            let check = judge_processes(hidden, seen, 2, is_first);
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
    }

    #[test]
    fn what_a_first_pod_shows_is_a_warning_and_the_rest_fails() {
        let unused = Error::UnusedCgroups(vec!["/a".into(), "/b".into()]);
        let mixed = Error::MixedCgroups { release: "5.10.0".to_owned() };
        let cases = [
            (unused, Warn, "none of them has a process", "wait for the first pod"),
            (mixed, Fail, "net_cls or net_prio", "cgroup_no_v1=net_cls,net_prio"),
            (Error::NoCgroup { hint: "" }, Fail, "found no pods' cgroup", "systemd.unified_cgroup"),
            (Error::SeveralCgroups(Vec::new()), Fail, "found several", "--cgroup"),
        ];
        for (error, verdict, finding, remedy) in cases {
            let check = missing(&error);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.finding.contains(finding), "{check:?}");
            assert!(check.remedy.as_deref().unwrap().contains(remedy), "{check:?}");
        }
    }
}

//! What is unusual about a hand-out, for alarms. It decides nothing: a process may call itself anything.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use prometheus_client::encoding::EncodeLabelValue;
use serde::Serialize;
use tokio::time::Instant;

use kiam_core::pods::{ContainerId, Executable, Inspection, Pod, PodReader, PodUid, Relative};
use kiam_kernel::identity::ContainerAge;

const SHELLS: [&str; 7] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "mksh"];
/// Programs that scripts fetch credentials with.
const FETCHERS: [&str; 2] = ["curl", "wget"];
const BUSYBOX: &str = "busybox";
/// A container that uses credentials asks for them within this time of its start.
const LATE: Duration = Duration::from_secs(600);
/// Pods that are remembered beyond twice the number of known pods, and containers of one pod. Kubernetes restarts a container
/// every five minutes at most, so that those of a pod are few.
const GONE: usize = 64;
const CONTAINERS: usize = 64;

/// Why a hand-out is unusual.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Reason {
    /// A shell asked, or a program that a shell had started.
    Shell,
    /// A container asked for the first time that has run for long without asking, or that the process was started in from
    /// outside.
    Container,
}

/// The containers that have asked before.
pub(super) struct KnownContainers {
    pods: HashMap<PodUid, HashSet<ContainerId>>,
    settled_at: Instant,
}

// === impl KnownContainers ===

impl KnownContainers {
    /// None yet. `settled` later, every container that uses credentials has asked.
    pub(super) fn new(settled: Duration) -> Self {
        Self { pods: HashMap::new(), settled_at: Instant::now() + settled }
    }

    /// Whether `container` asks for the first time, and is then remembered.
    pub(super) fn is_new(
        &mut self,
        pod: &PodUid,
        container: &ContainerId,
        pods: &PodReader,
    ) -> bool {
        if self.pods.len() >= 2 * pods.count::<Pod>() + GONE {
            self.pods.retain(|uid, _| pods.by_uid(uid).is_ok());
        }
        let known = self.pods.entry(pod.clone()).or_default();
        if known.contains(container) {
            return false;
        }
        if known.len() >= CONTAINERS {
            known.clear();
        }
        known.insert(container.clone())
    }

    /// Whether a new container of this age is late.
    pub(super) fn is_late(&self, age: ContainerAge) -> bool {
        let settled = Instant::now() >= self.settled_at;
        match age {
            ContainerAge::Of(age) => settled && age > LATE,
            ContainerAge::Entered => settled,
            ContainerAge::Unknown => false,
        }
    }
}

/// Whether a process with the name `comm` at connect is a shell, or was started by one. The first process of a container may be
/// a shell that only starts the program, so that it counts only as the parent of a program that scripts use.
pub(super) fn is_of_shell(comm: &[u8], inspection: Option<&Inspection>) -> bool {
    let executable = inspection.and_then(|it| match &it.executable {
        Executable::Running(path) | Executable::Changed(path) => Some(path.as_slice()),
        Executable::Gone | Executable::Unreadable => None,
    });
    let renamed = inspection.is_some_and(|it| matches!(it.executable, Executable::Changed(_)));
    // A program that was a shell at connect may have replaced itself since.
    if is_shell(comm, executable) || (renamed && is_shell(comm, None)) {
        return true;
    }
    let fetches =
        is_one_of(&FETCHERS, comm) || executable.is_some_and(|it| is_one_of(&FETCHERS, base(it)));
    let Some(parent) = inspection.and_then(|it| it.parent.as_ref()) else { return false };
    let Relative { comm, executable, is_first, .. } = parent;
    is_shell(comm, executable.as_deref()) && (!is_first || fetches)
}

/// Whether a process is a shell: by its program where that is known, else by its name. Of BusyBox the name says which of its
/// programs runs.
fn is_shell(comm: &[u8], executable: Option<&[u8]>) -> bool {
    match executable.map(base) {
        Some(program) if program != BUSYBOX.as_bytes() => is_one_of(&SHELLS, program),
        _ => is_one_of(&SHELLS, comm),
    }
}

/// The name of a program's file.
fn base(path: &[u8]) -> &[u8] {
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

fn is_one_of(names: &[&str], name: &[u8]) -> bool {
    names.iter().any(|known| known.as_bytes() == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::pods::PodIndex;

    fn parent(comm: &str, program: &str, is_first: bool) -> Relative {
        let executable = (!program.is_empty()).then(|| program.as_bytes().to_vec());
        Relative { pid: 2, comm: comm.as_bytes().to_vec(), executable, is_first }
    }

    #[test]
    fn shells_and_what_they_start_are_unusual_and_programs_are_not() {
        let running = |path: &str| Executable::Running(path.as_bytes().to_vec());
        let changed = |path: &str| Executable::Changed(path.as_bytes().to_vec());
        let python = || running("/usr/bin/python3.11");
        let curl = || running("/usr/bin/curl");
        let sh = |is_first| Some(parent("sh", "/usr/bin/dash", is_first));
        let cases = [
            ("bash", running("/usr/bin/bash"), None, true),
            ("sh", running("/bin/busybox"), None, true),
            ("app", python(), None, false),
            ("app", python(), sh(false), true),
            // The first process of many containers: `sh -c "app"`.
            ("app", python(), sh(true), false),
            ("curl", curl(), sh(true), true),
            ("curl", curl(), sh(false), true),
            ("curl", curl(), Some(parent("app", "/usr/bin/python3.11", false)), false),
            ("wget", running("/bin/busybox"), Some(parent("sh", "/bin/busybox", true)), true),
            ("app", python(), Some(parent("timeout", "/bin/busybox", false)), false),
            // What a process calls itself does not count where its program is known.
            ("sh", python(), None, false),
            ("aws", running("/bin/bash (deleted)"), None, true),
            ("sh", Executable::Gone, None, true),
            ("aws", Executable::Gone, None, false),
            // `exec aws` of a shell that connected.
            ("bash", changed("/usr/bin/aws"), None, true),
            ("app", python(), Some(parent("sh", "", false)), true),
        ];
        for (comm, executable, parent, expected) in cases {
            let inspection = Inspection { executable, parent };
            let found = is_of_shell(comm.as_bytes(), Some(&inspection));
            assert_eq!(found, expected, "{comm}: {inspection:?}");
        }
        assert!(is_of_shell(b"bash", None) && !is_of_shell(b"aws", None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_is_new_once_and_late_only_once_the_agent_has_settled() {
        let (index, reader) = PodIndex::new();
        let pod = Pod::test(1);
        index.apply(pod.clone());
        let id = |n: usize| {
            let path = format!("pod{}/{n}", pod.uid);
            ContainerId::from_cgroup_path(path.as_ref()).unwrap()
        };
        let mut known = KnownContainers::new(Duration::from_secs(3600));
        assert!(known.is_new(&pod.uid, &id(1), &reader));
        assert!(!known.is_new(&pod.uid, &id(1), &reader));
        assert!(known.is_new(&pod.uid, &id(2), &reader));
        let (late, soon) = (ContainerAge::Of(LATE * 2), ContainerAge::Of(LATE / 2));
        assert!(!known.is_late(late) && !known.is_late(ContainerAge::Entered));
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert!(known.is_late(late) && known.is_late(ContainerAge::Entered));
        assert!(!known.is_late(soon) && !known.is_late(ContainerAge::Unknown));
        // Bounded, whatever pods and containers come.
        for n in 0..1000 {
            known.is_new(&pod.uid, &id(n), &reader);
            known.is_new(&PodUid::new(&format!("{n:032x}")), &id(n), &reader);
        }
        assert!(known.pods.len() <= GONE + 3, "{}", known.pods.len());
        assert!(known.pods.values().all(|containers| containers.len() <= CONTAINERS));
    }
}

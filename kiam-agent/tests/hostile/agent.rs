//! The agent's process: starting it, replacing it, and what it takes.

use std::{fs, path::Path, time::Duration};

use xtask::lab::{Agent, Lab, LabPod};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
/// What it logs when it has listeners, its own or the one's that it relieves.
const LISTENS: &str = "Listening";
const READY_LIMIT: Duration = Duration::from_secs(60);
/// Where the lab runs it.
const CGROUP: &str = "system.slice/kiam-agent.service";

/// An agent that serves, alone or as the successor of the one that did.
pub(crate) fn start(lab: &Lab, flags: &[&str]) -> Agent {
    let mut agent = Agent::start(lab, Path::new(AGENT), flags).unwrap();
    // Until it has taken over, it is the one before that says it is ready.
    agent.wait_said(LISTENS, READY_LIMIT).unwrap();
    agent.wait_ready(READY_LIMIT).unwrap();
    agent
}

/// The processor time of all agents of the node so far.
pub(crate) fn cpu(lab: &Lab) -> Duration {
    cpu_of(&lab.node.root_cgroup().join(CGROUP))
}

/// That of all processes of a pod, those that have ended too.
pub(crate) fn pods_cpu(pod: &LabPod) -> Duration {
    cpu_of(pod.slice().path())
}

/// The kernel counts it in cgroup2 even where the controller of processor time is another hierarchy's.
fn cpu_of(cgroup: &Path) -> Duration {
    let stat = fs::read_to_string(cgroup.join("cpu.stat")).unwrap();
    let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
    Duration::from_micros(micros.parse().unwrap())
}

/// Begins a new peak of the agent's memory.
pub(crate) fn forget_peak(agent: &Agent) {
    fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
}

/// The agent's peak of resident memory since then, in MiB.
pub(crate) fn peak(agent: &Agent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib.div_ceil(1024)
}

/// Connects that were denied for want of a lease, since the maps were pinned.
pub(crate) fn lapses(agent: &Agent) -> u64 {
    let metrics = agent.admin("/metrics").unwrap().body;
    let name = "kiam_intercept_verdicts_total{verdict=\"denied_lease\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().parse().unwrap()
}

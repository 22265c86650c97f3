//! The agent's process: starting it, replacing it, and what it takes.

use std::{fs, path::Path, time::Duration};

use lab::{Agent, Lab, LabPod};

/// Where the lab runs it.
const CGROUP: &str = "system.slice/kiam-agent.service";

/// The processor time that all agents of the node have used so far.
pub(crate) fn cpu(lab: &Lab) -> Duration {
    cpu_of(&lab.node.root_cgroup().join(CGROUP))
}

/// The processor time that all processes of a pod have used, including those that have ended.
pub(crate) fn pods_cpu(pod: &LabPod) -> Duration {
    cpu_of(pod.slice().path())
}

/// The kernel counts it in cgroup2 even where the controller of processor time is another hierarchy's.
fn cpu_of(cgroup: &Path) -> Duration {
    let stat = fs::read_to_string(cgroup.join("cpu.stat")).unwrap();
    let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
    Duration::from_micros(micros.parse().unwrap())
}

/// Resets the peak of the agent's resident memory.
pub(crate) fn forget_peak(agent: &Agent) {
    fs::write(format!("/proc/{}/clear_refs", agent.pid()), "5").unwrap();
}

/// The peak of the agent's resident memory since the reset, in MiB.
pub(crate) fn peak(agent: &Agent) -> u64 {
    agent.memory("VmHWM").unwrap().div_ceil(1024 * 1024)
}

/// Connects that were denied for want of a lease, since the maps were pinned.
pub(crate) fn lapses(agent: &Agent) -> u64 {
    sum(agent, "kiam_intercept_verdicts_total{verdict=\"denied_lease\"")
}

/// Lists of namespaces that the agent has read.
pub(crate) fn lists(agent: &Agent) -> u64 {
    sum(agent, "kiam_cluster_lists_total{resource=\"Namespaces\"")
}

/// The sum of all metrics whose line begins so.
fn sum(agent: &Agent, begins: &str) -> u64 {
    let metrics = agent.metrics();
    let lines = metrics.lines().filter(|line| line.starts_with(begins));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

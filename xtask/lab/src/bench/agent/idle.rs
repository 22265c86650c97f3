//! An idle node.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context, Result};
use lab::{Agent, Lab, LabPod, PodSpec};

use super::{Figure, Plan};

const PODS: u32 = 100;
const LIMIT: Duration = Duration::from_secs(60);
/// After this nothing of the start goes on: 30 s until the kernel's table is known to be the agent's alone, and some.
const SETTLED: Duration = Duration::from_secs(45);
/// One self-test, whenever it comes.
const MINUTE: Duration = Duration::from_secs(60);

/// The agent's CPU and wake-ups while nothing happens.
pub(super) fn idle(plan: &Plan) -> Result<Vec<Figure>> {
    let lab = Lab::start()?;
    // As API servers do. The lab's own pace is each second.
    lab.kubernetes.bookmark_every(MINUTE);
    let pods = if plan.quick { 10 } else { PODS };
    let pods: Vec<LabPod> = (0..pods)
        .map(|number| lab.pod(PodSpec::new("shop", &format!("pod-{number}")).role("bench")))
        .collect::<Result<_>>()?;
    let mut agent = Agent::start(&lab, &plan.agent, &["--level=info"])?;
    agent.wait_ready(LIMIT)?;
    sleep(SETTLED);
    let time = if plan.quick { Duration::from_secs(5) } else { MINUTE };
    let before = (agent.cpu_time()?, wake_ups(agent.pid())?);
    sleep(time);
    let after = (agent.cpu_time()?, wake_ups(agent.pid())?);
    let cpu = after.0.saturating_sub(before.0).as_secs_f64() * 1e3 * 60.0 / time.as_secs_f64();
    let wakes = (after.1 - before.1) as f64 / time.as_secs_f64();
    let name = format!("idle, {} pods", pods.len());
    Ok(vec![
        Figure::one("idle", name.clone(), "CPU ms a minute", cpu),
        Figure::one("idle", name, "wake-ups a second", wakes),
    ])
}

/// Voluntary switches of all threads: each is a wait that ended.
fn wake_ups(pid: u32) -> Result<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).context("listing threads")?;
    let mut all = 0;
    for task in tasks {
        let status = task.context("a thread")?.path().join("status");
        // A thread may have ended.
        let Ok(status) = fs::read_to_string(status) else { continue };
        let count = status.lines().find_map(|it| it.strip_prefix("voluntary_ctxt_switches:"));
        all += count.map_or(Ok(0), |count| count.trim().parse::<u64>()).context("a count")?;
    }
    Ok(all)
}

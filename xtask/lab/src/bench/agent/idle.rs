//! An idle node, and what others' connects cost.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context, Result};
use lab::{Agent, Lab, LabPod, PodSpec, program_runs};

use super::{Figure, Plan};

const PODS: u32 = 100;
const LIMIT: Duration = Duration::from_secs(60);
/// Unrelated connections of a measurement.
const CONNECTS: u32 = 20_000;

/// The agent's CPU and wake-ups while nothing happens, and the time of its programs for each unrelated connect.
pub(super) fn idle(plan: &Plan) -> Result<Vec<Figure>> {
    let lab = Lab::start()?;
    let pods = if plan.quick { 10 } else { PODS };
    let pods: Vec<LabPod> = (0..pods)
        .map(|number| lab.pod(PodSpec::new("shop", &format!("pod-{number}")).role("bench")))
        .collect::<Result<_>>()?;
    let mut agent = Agent::start(&lab, &plan.agent, &["--level=info"])?;
    agent.wait_ready(LIMIT)?;
    sleep(Duration::from_secs(5));
    let time = Duration::from_secs(if plan.quick { 5 } else { 30 });
    let before = (agent.cpu_time()?, wake_ups(agent.pid())?);
    sleep(time);
    let after = (agent.cpu_time()?, wake_ups(agent.pid())?);
    let cpu = after.0.saturating_sub(before.0).as_secs_f64() * 1e3 * 60.0 / time.as_secs_f64();
    let wakes = (after.1 - before.1) as f64 / time.as_secs_f64();
    let name = format!("idle, {} pods", pods.len());
    let mut figures = vec![
        Figure::one("idle", name.clone(), "CPU ms a minute", cpu),
        Figure::one("idle", name, "wake-ups a second", wakes),
    ];
    figures.extend(programs(&pods[0])?);
    Ok(figures)
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

/// What the kernel says of the programs' runs while a pod opens connections that are nobody's business.
fn programs(pod: &LabPod) -> Result<Vec<Figure>> {
    const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";
    let was = fs::read_to_string(SWITCH).context("reading bpf_stats_enabled")?;
    fs::write(SWITCH, "1").context("setting bpf_stats_enabled")?;
    let outcome = connects_by_program(pod);
    fs::write(SWITCH, was.trim()).context("resetting bpf_stats_enabled")?;
    outcome
}

fn connects_by_program(pod: &LabPod) -> Result<Vec<Figure>> {
    let before = program_runs()?;
    connects(pod)?;
    let figures = program_runs()?.into_iter().filter_map(|after| {
        let before = before.iter().find(|before| before.id == after.id)?;
        let (count, nanos) = (after.count - before.count, after.nanos - before.nanos);
        (count >= u64::from(CONNECTS)).then(|| {
            let name = format!("an unrelated connect, program {}", after.name);
            Figure::one("idle", name, "ns a run", nanos as f64 / count as f64)
        })
    });
    Ok(figures.collect())
}

/// Connects to a closed port of the pod's own loopback, again and again.
fn connects(pod: &LabPod) -> Result<()> {
    let script = format!(
        "import socket\nfor _ in range({CONNECTS}):\n s=socket.socket()\n s.connect_ex(('127.0.0.1',9))\n s.close()\n"
    );
    let status = pod.command("python3")?.args(["-c", &script]).status();
    anyhow::ensure!(status.context("running python3")?.success(), "the connects failed");
    Ok(())
}

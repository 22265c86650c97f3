//! An STS that takes three seconds: real clients, whose only attempt at the metadata service is one second, must not
//! notice in pods that were scheduled five seconds before.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::fake::Injected;
use lab::fake::imds::REGION;
use lab::{Agent, Lab, LabPod, PodSpec, agent_binary, role_arn};
use tokio::time::Instant;

use super::javascript::JavaScript;
use super::verdict::Seen;
use super::{SCRIPT, client, finished, program};
use xtask::command::say;

/// Every other one has a client of the other language.
const PODS: usize = 6;
const LATENCY: Duration = Duration::from_secs(3);
/// Between a pod's scheduling and its first container: sandbox, volumes, image.
const STARTING: Duration = Duration::from_secs(5);
const READY_LIMIT: Duration = Duration::from_secs(30);

/// Runs a client in each pod, in all at once.
pub(super) fn run() -> Result<()> {
    let javascript = JavaScript::ensure()?;
    let lab = Lab::start()?;
    let mut agent = Agent::start(&lab, &agent_binary().context("looking for the agent")?, &[])?;
    agent.wait_ready(READY_LIMIT)?;
    lab.sts.faults().inject(Injected::slow(LATENCY));
    let scheduled = Instant::now();
    let spec = |n| PodSpec::new("shop", &format!("slow-{n}")).role(&format!("role-{n}"));
    let specs: Vec<PodSpec> = (0..PODS).map(|n| lab.schedule(spec(n))).collect::<Result<_>>()?;
    thread::sleep(STARTING.saturating_sub(scheduled.elapsed()));
    let mut pods = specs.into_iter().map(|spec| lab.node.pod(spec)).collect::<Result<Vec<_>>>()?;
    pods.iter_mut().try_for_each(LabPod::pause)?;
    let command = |(n, pod)| match n % 2 {
        0 => boto3(pod),
        _ => sdk_for_javascript(pod, &javascript),
    };
    let ended = finished(pods.iter().enumerate().map(command))?;
    for (n, ended) in ended.iter().enumerate() {
        let seen = Seen::read(ended)?;
        let owner = seen.access_key.and_then(|key| lab.sts.owner(&key)).map(|issued| issued.role);
        if owner.as_deref() != Some(&role_arn(&format!("role-{n}"))) {
            let (said, log) = (String::from_utf8_lossy(&ended.stderr), agent.log());
            bail!("the client in pod slow-{n} is {owner:?}: {said}; the agent said:\n{log}");
        }
    }
    let calls = lab.sts.requests();
    if calls != PODS as u64 {
        bail!("{calls} calls of STS for {PODS} roles");
    }
    say(format!(
        "boto3 and the SDK for JavaScript, one attempt of 1 s, STS takes {LATENCY:?}: all of {PODS} pods are served"
    ));
    Ok(())
}

/// boto3, with its defaults written out.
fn boto3(pod: &LabPod) -> Result<Command> {
    let mut command = client(pod, program("python"))?;
    command.env_clear().args([SCRIPT, "boto3-key"]);
    command.env("AWS_REGION", REGION).env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("AWS_METADATA_SERVICE_TIMEOUT", "1").env("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1");
    Ok(command)
}

fn sdk_for_javascript(pod: &LabPod, javascript: &JavaScript) -> Result<Command> {
    let mut command = client(pod, "node")?;
    command.arg("xtask/lab/acceptance/client.mjs").arg(&javascript.folder);
    command.env("AWS_REGION", REGION);
    Ok(command)
}

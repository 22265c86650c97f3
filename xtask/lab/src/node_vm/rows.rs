//! What is tried on a node whose agent came before the pods.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    Layout, PodSpec,
    runtime::{self, Exited, Kubelet, Processes, Sandbox, Shape},
};
use tokio::time::Instant;

use super::{
    agent_pod::AgentPod,
    client::{AskingPod, Tally},
    guest::Row,
    lives, networkd,
    stage::{NAMESPACE, OF_NODE, Owner, SOCKET, Stage, ask, output, wait},
};

pub(super) const ALL: [Row; 16] = [
    ("self-test", self_test),
    ("both paths", both_paths),
    ("burstable pod", |stage| whole_pod(stage, pod(stage), Shape::default())),
    ("guaranteed pod", |stage| {
        whole_pod(stage, pod(stage).layout(Layout::SystemdGuaranteed), Shape::default())
    }),
    ("shared process namespace", |stage| {
        whole_pod(stage, pod(stage), Shape { processes: Processes::Pod, ..Shape::default() })
    }),
    ("hostPID", |stage| {
        whole_pod(stage, pod(stage), Shape { processes: Processes::Node, ..Shape::default() })
    }),
    ("privileged pod", |stage| {
        whole_pod(stage, pod(stage), Shape { privileged: true, ..Shape::default() })
    }),
    ("user namespace", |stage| {
        whole_pod(stage, pod(stage), Shape { user_namespace: true, ..Shape::default() })
    }),
    ("hostNetwork", host_network),
    ("mirror pods", lives::mirror_pods),
    ("crash loop", lives::crash_loop),
    ("first connects", first_connects),
    ("roll-outs", roll_outs),
    ("kill -9", kill),
    ("restart of containerd", restart_of_containerd),
    ("restart of networkd", networkd::restart),
];

pub(super) const ROLE: &str = "orders";
/// Pods that start at the same time, and how many in all.
const TOGETHER: usize = 3;
const STARTS: usize = 12;
const ROLL_OUTS: usize = 3;

pub(super) fn pod(stage: &Stage) -> PodSpec {
    PodSpec::new(NAMESPACE, &stage.name("pod")).role(ROLE)
}

fn self_test(stage: &mut Stage) -> Result<String> {
    let agent = AgentPod::start(stage, &[], &[])?;
    let took = agent.wait_ready()?;
    stage.agent = Some(agent);
    let release = output("uname", &["-r"])?;
    Ok(format!("ready after {:.1} s on {}", took.as_secs_f64(), release.trim()))
}

/// Replaces the agent by one with further flags, as a surging roll-out does.
fn replace(stage: &mut Stage, further: &[&str]) -> Result<()> {
    let next = AgentPod::start(stage, further, &[])?;
    // Until then the probe may be answered by nobody, and is then tried again.
    next.wait_ready()?;
    let before = stage.agent.replace(next).context("no agent was started")?;
    before.end(stage)
}

/// Runs one container whose first process asks.
pub(super) fn asks(
    kubelet: &Kubelet,
    sandbox: &Sandbox,
    container: (&str, u32),
    role: &str,
) -> Result<Exited> {
    let command = ask(role);
    let container = kubelet.start(sandbox, container, &command.each_ref().map(|word| &**word))?;
    kubelet.wait(&container)
}

fn both_paths(stage: &mut Stage) -> Result<String> {
    let kubelet = stage.kubelet()?;
    let mut counted = Vec::new();
    for (further, wanted) in [(None, (0, 1)), (Some("--path=node"), (1, 0)), (None, (0, 1))] {
        if !counted.is_empty() {
            replace(stage, &further.into_iter().collect::<Vec<_>>())?;
        }
        let (spec, sandbox) = stage.sandbox(&kubelet, pod(stage), Shape::default())?;
        stage.publish(&kubelet, &spec, &sandbox)?;
        let (node, inside) = stage.ways()?;
        let exited = asks(&kubelet, &sandbox, ("main", 0), ROLE)?;
        stage.ensure_role(&exited.output, ROLE)?;
        let after = stage.ways()?;
        let ways = (after.0 - node, after.1 - inside);
        ensure!(ways == wanted, "{ways:?} by the node's path and inside, not {wanted:?}");
        counted.push(ways);
        stage.delete(&kubelet, &spec, sandbox)?;
    }
    Ok("its own role by each".to_owned())
}

/// An init container, one that stays, one beside it, its next life, and a command in the one that stays: each asks as it
/// starts.
fn whole_pod(stage: &mut Stage, spec: PodSpec, shape: Shape) -> Result<String> {
    let kubelet = stage.kubelet()?;
    let (spec, sandbox) = stage.sandbox(&kubelet, spec, shape)?;
    let (node, inside) = stage.ways()?;
    let mut served = 0;
    let mut judge = |what: &str, exited: Exited| {
        served += 1;
        ensure!(exited.code == 0, "{what}: {exited:?}");
        stage.ensure_role(&exited.output, ROLE).with_context(|| what.to_owned())
    };
    judge("init container", asks(&kubelet, &sandbox, ("init", 0), ROLE)?)?;
    let main = kubelet.start(&sandbox, ("main", 0), &["/bin/busybox", "sleep", "600"])?;
    stage.publish(&kubelet, &spec, &sandbox)?;
    judge("sidecar", asks(&kubelet, &sandbox, ("beside", 0), ROLE)?)?;
    judge("restarted container", asks(&kubelet, &sandbox, ("beside", 1), ROLE)?)?;
    let command = ask(ROLE);
    let executed = kubelet.execute(&main, &command.each_ref().map(|word| &**word))?;
    judge("probe", executed)?;
    let after = stage.ways()?;
    let cgroup = sandbox.cgroup().to_owned();
    stage.delete(&kubelet, &spec, sandbox)?;
    ensure!(!cgroup.exists(), "{} is left", cgroup.display());
    let (by_node, inside) = (after.0 - node, after.1 - inside);
    Ok(format!("{served} of 4 its own role; {inside} inside, {by_node} by the node's path"))
}

fn host_network(stage: &mut Stage) -> Result<String> {
    let kubelet = stage.kubelet()?;
    let spec = pod(stage).host_network();
    let (spec, sandbox) = stage.sandbox(&kubelet, spec, Shape::default())?;
    stage.publish(&kubelet, &spec, &sandbox)?;
    let exited = asks(&kubelet, &sandbox, ("main", 0), OF_NODE)?;
    let owner = stage.owner(&exited.output)?;
    ensure!(owner == Owner::Node, "{owner:?}");
    stage.delete(&kubelet, &spec, sandbox)?;
    Ok("the node's role, as --host-network-pods=pass says".to_owned())
}

/// Makes pods whose only container asks, one after the other.
fn start_some(stage: &Stage, count: usize) -> Result<()> {
    let kubelet = stage.kubelet()?;
    for _ in 0..count {
        let (spec, sandbox) = stage.sandbox(&kubelet, pod(stage), Shape::default())?;
        let command = ask(ROLE);
        let command = command.each_ref().map(|word| &**word);
        let container = kubelet.start(&sandbox, ("main", 0), &command)?;
        // The kubelet tells the API about a pod's address when it has started its containers.
        stage.publish(&kubelet, &spec, &sandbox)?;
        let exited = kubelet.wait(&container)?;
        stage.ensure_role(&exited.output, ROLE)?;
        stage.delete(&kubelet, &spec, sandbox)?;
    }
    Ok(())
}

fn first_connects(stage: &mut Stage) -> Result<String> {
    let (node, inside) = stage.ways()?;
    let stage = &*stage;
    thread::scope(|scope| {
        let make = || start_some(stage, STARTS / TOGETHER);
        let makers: Vec<_> = (0..TOGETHER).map(|_| scope.spawn(make)).collect();
        let done = makers.into_iter().map(|maker| maker.join().expect("no maker panics"));
        done.collect::<Result<Vec<()>>>()
    })?;
    let after = stage.ways()?;
    let (by_node, inside) = (after.0 - node, after.1 - inside);
    Ok(format!("{STARTS} of {STARTS} its own role; {inside} inside, {by_node} by the node's path"))
}

fn roll_outs(stage: &mut Stage) -> Result<String> {
    let client = AskingPod::start(stage)?;
    for _ in 0..ROLL_OUTS {
        replace(stage, &[])?;
        client.go_on(stage)?;
    }
    // A pod that is deleted: its successor comes a second after it was asked to end.
    let before = stage.agent.take().context("no agent was started")?;
    let next = thread::scope(|scope| {
        let ending = scope.spawn(|| before.end(stage));
        thread::sleep(Duration::from_secs(1));
        let next = AgentPod::start(stage, &[], &[]);
        ending.join().expect("ending an agent does not panic")?;
        next
    })?;
    next.wait_ready()?;
    stage.agent = Some(next);
    client.go_on(stage)?;
    let served = client.finish_served(stage)?;
    Ok(format!("0 of {served} requests failed, in {ROLL_OUTS} roll-outs and one deletion"))
}

fn kill(stage: &mut Stage) -> Result<String> {
    let client = AskingPod::start(stage)?;
    client.go_on(stage)?;
    let agent = stage.agent()?;
    agent.kill()?;
    let begun = Instant::now();
    agent.restart()?;
    agent.wait_said("Listening")?;
    let listening = begun.elapsed();
    agent.wait_ready()?;
    client.go_on(stage)?;
    let Tally { served, failures, longest } = client.finish(stage)?;
    let refused = failures.iter().all(|failure| failure.contains("can't connect"));
    ensure!(refused, "something else than a refused connect: {failures:?}");
    Ok(format!(
        "{} of {} requests refused; {:.1} s to the next answer, {:.1} s from the start to serving",
        failures.len(),
        served + failures.len(),
        longest.as_secs_f64(),
        listening.as_secs_f64()
    ))
}

fn restart_of_containerd(stage: &mut Stage) -> Result<String> {
    let client = AskingPod::start(stage)?;
    output("systemctl", &["restart", "containerd"])?;
    let served = client.tally(stage)?.served;
    client.wait_served(stage, served + 10)?;
    wait("containerd", || runtime::unready(Path::new(SOCKET)))?;
    stage.agent()?.wait_ready()?;
    start_some(stage, 1)?;
    let served = client.finish_served(stage)?;
    Ok(format!("0 of {served} requests failed; the next pod its own role"))
}

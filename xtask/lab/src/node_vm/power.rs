//! After a loss of power: pods that start before the agent does, and ask at once.

use std::{fs, path::Path, thread};

use anyhow::{Context, Result, bail, ensure};
use lab::{
    PodSpec, role_arn,
    runtime::{Bind, Container, Sandbox, Shape},
};

use super::{
    agent_pod::{AgentPod, uninstall},
    guest::Row,
    stage::{NAMESPACE, Owner, Stage, guard_rules, output, wait},
};

pub(super) const UNGUARDED: [Row; 3] = [
    ("power loss, no guard", |stage| early_pods(stage, false)),
    ("agent after those pods", |stage| agent_comes(stage, false)),
    ("boot guard installed", boot_guard_installed),
];
pub(super) const GUARDED: [Row; 3] = [
    ("power loss, boot guard", |stage| early_pods(stage, true)),
    ("agent after refused pods", |stage| agent_comes(stage, true)),
    ("uninstall", uninstalled),
];

/// What systemd makes when it starts the kubelet's unit.
const KUBELET: &str = "/run/kubelet";
const UNITS: &str = "/etc/systemd/system";
const UNIT: &str = "kiam-boot-guard.service";
/// What `deploy/boot-guard` adds to the agent's flags.
const BOOT_GUARD: &str = "--boot-guard=/host/etc/systemd/system";
const PODS: usize = 5;
/// What an SDK does first: lists the role, and asks for its credentials, until it has them. Says what came of each try.
const SCRIPT: &str = "
at=http://169.254.169.254/latest/meta-data/iam/security-credentials/
while :; do
    role=$(/bin/busybox wget -T 5 -qO- $at 2>&1) && answer=$(/bin/busybox wget -T 5 -qO- $at$role 2>&1) && break
    echo no $role
    /bin/busybox sleep 0.2
done
echo yes $answer
exec /bin/busybox sleep 3600";

/// A pod that asks as its first act.
pub(super) struct Early {
    role: String,
    spec: PodSpec,
    sandbox: Sandbox,
    container: Container,
}

/// What such a pod has said.
#[derive(Debug)]
struct Said {
    /// What it was told each time that it got nothing.
    refusals: Vec<String>,
    owner: Option<Owner>,
}

// === impl Early ===

impl Early {
    fn start(stage: &Stage, number: usize) -> Result<Self> {
        let kubelet = stage.kubelet()?;
        let role = format!("early-{number}");
        let spec = PodSpec::new(NAMESPACE, &stage.name("early")).role(&role);
        let (spec, sandbox) = stage.sandbox(&kubelet, spec, Shape::default())?;
        let container = kubelet.start(&sandbox, ("main", 0), &["/bin/sh", "-c", SCRIPT])?;
        stage.publish(&kubelet, &spec, &sandbox)?;
        Ok(Self { role, spec, sandbox, container })
    }

    fn said(&self, stage: &Stage) -> Result<Said> {
        let output = stage.kubelet()?.output(&self.container)?;
        let refusals = output.lines().filter_map(|line| line.strip_prefix("no "));
        let refusals = refusals.map(ToOwned::to_owned).collect();
        let answer = output.lines().find_map(|line| line.strip_prefix("yes "));
        Ok(Said { refusals, owner: answer.map(|answer| stage.owner(answer)).transpose()? })
    }
}

fn early_pods(stage: &mut Stage, guarded: bool) -> Result<String> {
    wait("the kubelet", || {
        (!Path::new(KUBELET).exists()).then(|| "systemd has not started it".to_owned())
    })?;
    let shared = &*stage;
    let early = thread::scope(|scope| {
        let start = |number| scope.spawn(move || Early::start(shared, number));
        let starting: Vec<_> = (0..PODS).map(start).collect();
        let started = starting.into_iter().map(|early| early.join().expect("no start panics"));
        started.collect::<Result<Vec<_>>>()
    })?;
    let stage_now = &*stage;
    let look = || early.iter().map(|early| early.said(stage_now)).collect::<Result<Vec<_>>>();
    // Long enough for each to have been refused more than once.
    wait("the pods' first tries", || match look() {
        Ok(said) if said.iter().all(|said| said.owner.is_some() || said.refusals.len() > 2) => None,
        other => Some(format!("{other:?}")),
    })?;
    let said = look()?;
    for refusals in said.iter().map(|said| &said.refusals).filter(|_| guarded) {
        // By a rule, and not since nothing works: later tries may hear nothing, as the kernel limits ICMP's rate.
        let first = refusals.first().context("a pod was not refused")?;
        ensure!(first.contains("No route to host"), "refused by something else: {first}");
    }
    let owners: Vec<_> = said.into_iter().filter_map(|said| said.owner).collect();
    stage.early = early;
    let of_node = owners.iter().filter(|&owner| *owner == Owner::Node).count();
    let counted = format!("{of_node} of {PODS} pods got the node's credentials before the agent");
    match (guarded, of_node) {
        // Without a guard the test must see what it looks for.
        (false, 0) | (true, 1..) => bail!(counted),
        _ => Ok(counted),
    }
}

fn agent_comes(stage: &mut Stage, guarded: bool) -> Result<String> {
    let agent = AgentPod::start(stage, &[BOOT_GUARD], &[units()])?;
    let took = agent.wait_ready()?;
    agent.wait_said(if guarded {
        "boot guard kept those"
    } else {
        "Pods ran before the kernel"
    })?;
    stage.agent = Some(agent);
    let exposed = stage.metric("kiam_intercept_older_pods")?;
    ensure!((exposed == 0) == guarded, "{exposed} pods are reported as older");
    let early = std::mem::take(&mut stage.early);
    let mut own = 0;
    for pod in early {
        let said = || pod.said(stage).ok()?.owner;
        wait("a pod's credentials", || said().is_none().then(|| "it has none".to_owned()))?;
        match said().context("it had credentials before")? {
            Owner::Node => {}
            owner => {
                ensure!(owner == Owner::Role(role_arn(&pod.role)), "{owner:?} for {}", pod.role);
                own += 1;
            }
        }
        stage.delete(&stage.kubelet()?, &pod.spec, pod.sandbox)?;
    }
    let took = took.as_secs_f64();
    Ok(format!(
        "ready after {took:.1} s; {own} of {PODS} pods got their own role then, and {exposed} are reported as older"
    ))
}

fn units() -> Bind {
    Bind { node: UNITS.to_owned(), container: format!("/host{UNITS}"), follows: false }
}

fn boot_guard_installed(_: &mut Stage) -> Result<String> {
    let enabled = || output("systemctl", &["is-enabled", UNIT]);
    wait("the boot guard's unit", || enabled().err().map(|error| format!("{error:#}")))?;
    Ok(format!("{UNIT} is {}", enabled()?.trim()))
}

fn uninstalled(stage: &mut Stage) -> Result<String> {
    let agent = stage.agent.take().context("no agent was started")?;
    agent.end(stage)?;
    uninstall(stage)?;
    let mut left = guard_rules()?;
    for folder in ["/sys/fs/bpf", "/run/kiam", UNITS, "/etc/systemd/system/multi-user.target.wants"]
    {
        let Ok(entries) = fs::read_dir(folder) else { continue };
        let names = entries.flatten().map(|entry| entry.path().display().to_string());
        left.extend(names.filter(|path| folder == "/run/kiam" || path.contains("kiam")));
    }
    ensure!(left.is_empty(), "left on the node: {left:?}");
    // No program stands between pods and the metadata service any more.
    let pod = Early::start(stage, 0)?;
    wait("a pod after that", || match pod.said(stage) {
        Ok(Said { owner: Some(Owner::Node), .. }) => None,
        other => Some(format!("{other:?}")),
    })?;
    stage.delete(&stage.kubelet()?, &pod.spec, pod.sandbox)?;
    Ok("nothing is left, and pods reach the node's metadata service again".to_owned())
}

//! What the Kubernetes API's records cost: memory, CPU of changes, and crowds of pods that come at once.

use std::{thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    fake::{
        Injected,
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord},
    },
    loopback::{self, LoopbackNode},
    pod_client::{Imds, Options},
};
use tokio::time::Instant;

use super::{Figure, Plan};
use xtask::command::command;

/// Bytes that make a pod's record as large as one of a cluster with a mesh.
const PADDING: usize = 5_300;
const NAMESPACES: u32 = 5_000;
const ROLES: u16 = 20;
const CROWD: u16 = 250;
const TEAMS: u16 = 50;
const STS: Duration = Duration::from_millis(50);
const LIMIT: Duration = Duration::from_secs(120);
const FLAGS: [&str; 2] = ["--level=info", "--pod-rate=1000000:1000000"];
/// The time between two events, as on a node: of a crowd of events the agent follows many at once.
const PAUSE: Duration = Duration::from_millis(25);
/// A pod's life: scheduled, running, ended, deleted.
const EVENTS: u32 = 4;

/// Peak memory with many records, after the start and after load.
pub(super) fn memory(plan: &Plan) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (pods, namespaces) in [(51, 1), (1_000, NAMESPACES)] {
        let node = started(plan, pods, namespaces)?;
        let peak = || node.agent.memory("VmHWM").map(|bytes| bytes as f64 / 1e6);
        let at_start = peak()?;
        let request =
            format!("http://{}/latest/meta-data/iam/security-credentials/", node.agent.pods());
        // Requests of an unknown caller are rejected, and cost the agent as much memory.
        let mut wrk = command("wrk");
        wrk.args(["-t2", "-c100", "-d3s", &request]);
        ensure!(wrk.output().context("running wrk")?.status.success(), "wrk failed");
        for number in 0..pods.min(200) {
            ensure!(ask(&node, &pod(number)), "pod {number} is served");
        }
        let name = format!("peak memory, {pods} pods, {namespaces} namespaces");
        figures.push(Figure::one("memory", format!("{name}, after the start"), "MB", at_start));
        figures.push(Figure::one("memory", format!("{name}, after load"), "MB", peak()?));
    }
    Ok(figures)
}

/// CPU of a pod's life, and of a namespace that is annotated again.
pub(super) fn changes(plan: &Plan) -> Result<Vec<Figure>> {
    let lives: u16 = if plan.quick { 15 } else { 40 };
    let mut figures = Vec::new();
    for pods in [51, 250, 1_000] {
        let node = started(plan, pods, NAMESPACES)?;
        let mut values = Vec::new();
        for round in 0..3 {
            let begun = settled(&node)?;
            for number in 0..lives {
                live(&node.kubernetes, 20_000 + round * lives + number);
            }
            let spent = settled(&node)?.saturating_sub(begun);
            values.push(spent.as_secs_f64() * 1e3 / f64::from(u32::from(lives) * EVENTS));
        }
        let name = format!("an event of a pod's life, {pods} pods, {NAMESPACES} namespaces");
        figures.extend(Figure::of("changes", name, "CPU ms", &values));
        if pods < 1_000 {
            continue;
        }
        let mut values = Vec::new();
        for round in 0..3_u32 {
            let begun = settled(&node)?;
            for number in 0..u32::from(lives) {
                let permitted = format!(".*|{round}-{number}");
                let name = format!("namespace-{}", number % 50);
                let namespace = NamespaceRecord::new(&name);
                let namespace = namespace.annotation("iam.amazonaws.com/permitted", &permitted);
                node.kubernetes.apply_namespace(&namespace);
                sleep(PAUSE);
            }
            let spent = settled(&node)?.saturating_sub(begun);
            values.push(spent.as_secs_f64() * 1e3 / f64::from(lives));
        }
        let name = format!("a namespace annotated again, {pods} pods, {NAMESPACES} namespaces");
        figures.extend(Figure::of("changes", name, "CPU ms", &values));
    }
    Ok(figures)
}

/// How long it takes until all pods of a crowd are served, and one alone.
pub(super) fn crowds(plan: &Plan) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (name, roles, warm) in [
        ("250 pods at once, warm", ROLES, true),
        ("250 pods at once, cold, 20 roles", ROLES, false),
        ("250 pods at once, cold, 250 identities", CROWD, false),
    ] {
        let node = LoopbackNode::start_by(&plan.agent, &FLAGS, |kubernetes, sts| {
            sts.faults().inject(Injected::slow(STS));
            let before = if warm { ROLES } else { 0 };
            for number in 0..before {
                loopback::schedule(kubernetes, &of_role(10_000 + number, number % roles));
            }
        })?;
        if warm {
            serve_all(&node, (0..ROLES).map(|number| of_role(10_000 + number, number)))?;
        }
        let pods: Vec<_> = (0..CROWD).map(|number| of_role(number, number % roles)).collect();
        let begun = Instant::now();
        pods.iter().for_each(|pod| loopback::schedule(&node.kubernetes, pod));
        serve_all(&node, pods.iter().cloned())?;
        figures.push(Figure::one("crowds", name, "s", begun.elapsed().as_secs_f64()));
        if warm {
            let mut waits = Vec::new();
            for number in 0..10 {
                let new = of_role(15_000 + number, 500 + number);
                let begun = Instant::now();
                loopback::schedule(&node.kubernetes, &new);
                serve_all(&node, [new])?;
                waits.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            let name = "a new pod of a new role, from ADDED to its credentials (STS 50 ms)";
            figures.extend(Figure::of("crowds", name, "ms", &waits));
        }
    }
    Ok(figures)
}

/// A node with that many records, whose first pods are served.
fn started(plan: &Plan, pods: u16, namespaces: u32) -> Result<LoopbackNode> {
    let node = LoopbackNode::start_by(&plan.agent, &FLAGS, |kubernetes, _| {
        for number in 0..namespaces {
            kubernetes.apply_namespace(&NamespaceRecord::new(&format!("namespace-{number}")));
        }
        (0..pods).for_each(|number| loopback::schedule(kubernetes, &pod(number)));
    })?;
    serve_all(&node, (0..ROLES).map(pod))?;
    Ok(node)
}

/// A pod of one of 50 namespaces and one of the roles, as large as usual.
fn pod(number: u16) -> PodRecord {
    let pod = of_role(number, number % ROLES);
    pod.annotation("example.com/mesh", &"x".repeat(PADDING))
}

fn of_role(number: u16, role: u16) -> PodRecord {
    let mut pod = loopback::pod(number).role(&format!("role-{role}"));
    // A namespace has a share of its own.
    pod.namespace = format!("namespace-{}", number % TEAMS);
    pod
}

fn live(kubernetes: &Kubernetes, number: u16) {
    let running = pod(number);
    let mut scheduled = running.clone();
    scheduled.ips.clear();
    "Pending".clone_into(&mut scheduled.phase);
    let mut ended = running.clone();
    "Succeeded".clone_into(&mut ended.phase);
    for record in [&scheduled, &running, &ended] {
        kubernetes.apply_pod(record);
        sleep(PAUSE);
    }
    kubernetes.delete_pod(&running.namespace, &running.name);
    sleep(PAUSE);
}

/// The agent's CPU time once it has nothing to do.
fn settled(node: &LoopbackNode) -> Result<Duration> {
    let begun = Instant::now();
    let mut last = node.agent.run_time()?;
    loop {
        sleep(Duration::from_millis(300));
        let now = node.agent.run_time()?;
        if now.saturating_sub(last) <= Duration::from_millis(3) || begun.elapsed() > LIMIT {
            return Ok(now);
        }
        last = now;
    }
}

/// Whether `pod` gets its own role's credentials.
fn ask(node: &LoopbackNode, pod: &PodRecord) -> bool {
    let options = Options { imds: Imds::V1, ..Options::default() };
    let attempt = node.ask(pod, &options);
    attempt.status == Some(200) && attempt.role.as_deref() == pod.annotated_role()
}

/// Waits until each of `pods` is served, by a few clients at once.
fn serve_all(node: &LoopbackNode, pods: impl IntoIterator<Item = PodRecord>) -> Result<()> {
    const CLIENTS: usize = 8;
    let pods: Vec<_> = pods.into_iter().collect();
    let served = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let own: Vec<_> = pods.iter().skip(client).step_by(CLIENTS).collect();
                scope.spawn(move || {
                    let begun = Instant::now();
                    own.into_iter().all(|pod| {
                        while !ask(node, pod) {
                            if begun.elapsed() > LIMIT {
                                return false;
                            }
                            sleep(Duration::from_millis(2));
                        }
                        true
                    })
                })
            })
            .collect();
        clients.into_iter().all(|client| client.join().is_ok_and(|served| served))
    });
    ensure!(served, "some pods got no credentials within {LIMIT:?}");
    Ok(())
}

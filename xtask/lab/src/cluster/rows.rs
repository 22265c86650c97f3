//! What is tried while the node keeps its power.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use lab::NODE_NAME;
use serde_json::Value;
use tokio::time::Instant;

use super::{
    laptop, life,
    pods::{NAMESPACE, Try, own},
    stage::{Stage, wait},
};
use crate::node_vm::Owner;
use xtask::command::workspace;

/// One thing that is tried; what was seen.
type Row = (&'static str, fn(&mut Stage) -> Result<String>);

/// The first rows, which all others build on.
pub(super) const NEEDED: usize = 2;

pub(super) const ALL: [Row; 24] = [
    ("node joins", node_joins),
    ("`kubectl apply -k deploy/`", apply),
    ("Job with an init container", job),
    ("Deployment with a sidecar", |stage| kind(stage, "sidecar", &["main", "beside"])),
    ("Guaranteed pod", |stage| kind(stage, "guaranteed", &["main"])),
    ("DaemonSet", |stage| passing_kind(stage, "daemon")),
    ("exec probe", |stage| passing_kind(stage, "exec-probe")),
    ("crash loop", crash_loop),
    ("static pod", static_pod),
    ("hostNetwork pod", host_network),
    ("packets of pods to the metadata service", no_packets),
    ("Events", events),
    ("`kiam-agent explain`", explain),
    ("`kubectl kiam`", laptop::from_the_laptop),
    ("rights of `deploy/`", rights),
    ("`kubectl delete pod` of the agent", delete_agent),
    ("reboot, no boot guard", life::reboot_unguarded),
    ("boot guard installed", life::boot_guard_installed),
    ("reboot, boot guard", life::reboot_guarded),
    ("probes", probes),
    ("restart of the kubelet", restart_of_kubelet),
    ("`kubectl rollout restart`", roll_out),
    ("drain and uncordon", drain),
    ("uninstall", life::uninstall),
];

/// The agent's user.
const ACCOUNT: &str = "system:serviceaccount:kube-system:kiam-agent";
/// Of the agent's own pods.
pub(super) const AGENT: &str =
    "--namespace=kube-system --selector=app.kubernetes.io/name=kiam-agent";

fn node_joins(stage: &mut Stage) -> Result<String> {
    let begun = Instant::now();
    stage.machine.power_on()?;
    stage.plane.ensure_runs()?;
    wait_node_ready(stage)?;
    let took = begun.elapsed();
    let node = stage.kubectl.get(&format!("node {NODE_NAME}"))?;
    let info = &node["status"]["nodeInfo"];
    let version = |name: &str| info[name].as_str().unwrap_or_default().to_owned();
    let systemd =
        stage.machine.shell("systemctl --version | head -n 1; runc --version | head -n 1")?;
    stage.versions = vec![
        format!("Kubernetes {}, its own kubectl", version("kubeletVersion")),
        format!("{}, Linux {}", version("osImage"), version("kernelVersion")),
        format!("{}, {}", version("containerRuntimeVersion"), systemd.trim().replace('\n', ", ")),
    ];
    stage.apply("namespaces.yaml")?;
    let kubectl = &stage.kubectl;
    for namespace in [NAMESPACE, "closed"] {
        wait("the namespace's account", || {
            let account = kubectl.get(&format!("serviceaccount default --namespace={namespace}"));
            account.err().map(|error| format!("{error:#}"))
        })?;
    }
    Ok(format!("Ready {:.1} s after power on", took.as_secs_f64()))
}

/// Whether the kubelet that runs now has said that the node is ready.
pub(super) fn wait_node_ready(stage: &Stage) -> Result<()> {
    wait("the node", || {
        let ready = stage.kubectl.get(&format!("node {NODE_NAME}"));
        match ready.map(|node| condition(&node, "Ready")) {
            Ok(true) => None,
            other => Some(format!("{other:?}")),
        }
    })
}

fn condition(object: &Value, name: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    conditions
        .filter(|condition| condition["type"] == name)
        .any(|condition| condition["status"] == "True")
}

/// The agent's one pod that is not on its way out.
pub(super) fn agent(stage: &Stage) -> Result<Value> {
    let pods = stage.kubectl.get(&format!("pods {AGENT}"))?;
    let pods = pods["items"].as_array().context("a list has items")?;
    let mut staying = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    staying.next().cloned().context("the agent has no pod")
}

/// Waits until a pod of the agent's that is not the one with this UID is ready.
pub(super) fn wait_agent(stage: &Stage, former: &str) -> Result<Value> {
    let ready = || {
        let pod = agent(stage)?;
        ensure!(pod["metadata"]["uid"] != former, "it is the former pod");
        ensure!(condition(&pod, "Ready"), "its pod is not ready: {}", pod["status"]);
        Ok(pod)
    };
    wait("the agent", || ready().err().map(|error| format!("{error:#}")))?;
    ready()
}

pub(super) fn uid(pod: &Value) -> &str {
    pod["metadata"]["uid"].as_str().unwrap_or_default()
}

fn apply(stage: &mut Stage) -> Result<String> {
    let folder = stage.kustomization(false)?;
    let begun = Instant::now();
    stage.kubectl.run(&format!("apply --kustomize={folder}"))?;
    stage.kubectl.run("rollout status daemonset/kiam-agent --namespace=kube-system")?;
    wait_agent(stage, "")?;
    Ok(format!("Ready after {:.1} s", begun.elapsed().as_secs_f64()))
}

/// All containers of pods of one kind, each with its own role at its first try.
pub(super) fn kind(stage: &mut Stage, name: &str, containers: &[&str]) -> Result<String> {
    stage.apply(&format!("{name}.yaml"))?;
    for container in containers {
        stage.ensure_first(name, container, &own(name))?;
    }
    let count = containers.len();
    Ok(format!("{count} of {count} containers: own role at the first try"))
}

/// The same for one with one container, which no later row needs.
fn passing_kind(stage: &mut Stage, name: &str) -> Result<String> {
    let said = kind(stage, name, &["main"])?;
    stage.delete(&format!("{name}.yaml"))?;
    Ok(said)
}

fn job(stage: &mut Stage) -> Result<String> {
    let said = kind(stage, "init-container", &["first", "main"])?;
    let wait = format!(
        "wait job/init-container --for=condition=complete --timeout=300s --namespace={NAMESPACE}"
    );
    stage.kubectl.run(&wait)?;
    stage.delete("init-container.yaml")?;
    Ok(format!("{said}; complete"))
}

fn crash_loop(stage: &mut Stage) -> Result<String> {
    kind(stage, "crash-loop", &["main"])?;
    let restarts = || -> Result<u64> {
        let pods = stage.pods("crash-loop")?;
        let container = &pods.first().context("there is no pod")?["status"]["containerStatuses"][0];
        container["restartCount"].as_u64().context("it was not started")
    };
    wait("the container's restarts", || match restarts() {
        Ok(2..) => None,
        other => Some(format!("{other:?}")),
    })?;
    let pod = stage.pod("crash-loop")?;
    // The last life may have just begun.
    let firsts = || -> Result<Vec<Try>> {
        let lives = [stage.former_tries(&pod, "main")?, stage.tries(&pod, "main")?];
        let firsts = lives.into_iter().map(|life| life.into_iter().next());
        firsts.collect::<Option<_>>().context("a life without a try")
    };
    wait("two lives' tries", || firsts().err().map(|error| format!("{error:#}")))?;
    for first in firsts()? {
        stage.ensure_owner(&first, &own("crash-loop"))?;
    }
    let restarts = restarts()?;
    stage.delete("crash-loop.yaml")?;
    Ok(format!("own role at the first try of each life; {restarts} restarts"))
}

fn static_pod(stage: &mut Stage) -> Result<String> {
    let manifest = fs::read_to_string(workspace().join("xtask/cluster/pods/static.yaml"))?;
    let file = "/etc/kubernetes/manifests/static.yaml";
    stage.machine.shell(&format!("cat >{file} <<'END'\n{manifest}END"))?;
    stage.ensure_first("static", "main", &own("static"))?;
    let name = stage.pod("static")?;
    stage.machine.shell(&format!("rm {file}"))?;
    wait("the mirror pod's end", || match stage.pods("static") {
        Ok(pods) if pods.is_empty() => None,
        other => Some(format!("{other:?}")),
    })?;
    Ok(format!("own role at the first try, by its mirror pod {name}"))
}

fn host_network(stage: &mut Stage) -> Result<String> {
    stage.apply("host-network.yaml")?;
    stage.ensure_first("host-network", "main", &Owner::Node)?;
    stage.delete("host-network.yaml")?;
    Ok("the node's role, as `--host-network-pods=pass` says".into())
}

fn no_packets(stage: &mut Stage) -> Result<String> {
    let packets = stage.imds.attackers_packets();
    ensure!(packets.is_empty(), "{packets:?}");
    Ok("0".into())
}

fn events(stage: &mut Stage) -> Result<String> {
    let begun = Instant::now();
    stage.apply("refused.yaml")?;
    let describe = || stage.kubectl.run("describe pod refused --namespace=closed");
    wait("the pod's Events", || match describe() {
        Ok(text) if text.contains("RoleForbidden") => None,
        other => Some(format!("{other:?}")),
    })?;
    let took = begun.elapsed();
    let text = describe()?;
    ensure!(text.contains("closed"), "it does not say why: {text}");
    stage.kubectl.run("delete pod refused --namespace=closed")?;
    Ok(format!(
        "`kubectl describe pod` shows RoleForbidden {:.1} s after the pod was made",
        took.as_secs_f64()
    ))
}

fn explain(stage: &mut Stage) -> Result<String> {
    kind(stage, "sidecar", &["main"])?;
    let (agent, pod) = (agent(stage)?, stage.pod("sidecar")?);
    let name = agent["metadata"]["name"].as_str().context("a pod has a name")?;
    let exec =
        format!("exec {name} --namespace=kube-system -- kiam-agent explain {NAMESPACE}/{pod}");
    let said = stage.kubectl.run(&exec)?;
    ensure!(said.contains(&lab::role_arn("sidecar")), "{said}");
    Ok("by `kubectl exec`: names the pod's role".into())
}

/// Successes and failures of the agent's probes, by kind, of all that the kubelet has run.
fn probe_counts(stage: &Stage) -> Result<Vec<(String, u64)>> {
    let path = format!("/api/v1/nodes/{NODE_NAME}/proxy/metrics/probes");
    let text = stage.kubectl.run(&format!("get --raw={path}"))?;
    let pod = agent(stage)?;
    let lines = text.lines().filter(|line| line.contains(uid(&pod)) && line.starts_with("prober_"));
    let mut counts = Vec::new();
    for line in lines {
        let field = |name: &str| {
            let rest = line.split_once(&format!("{name}=\""))?.1;
            Some(rest.split_once('"')?.0.to_lowercase())
        };
        let (kind, result) = (field("probe_type"), field("result"));
        let count = line.rsplit_once(' ').and_then(|(_, count)| count.parse::<f64>().ok());
        let name = kind.zip(result).map(|(kind, result)| format!("{kind} {result}"));
        // Whole numbers, which Prometheus' text writes as floats.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count")]
        let count = count.context("no count")? as u64;
        counts.push((name.context("a probe without a kind")?, count));
    }
    Ok(counts)
}

fn probes(stage: &mut Stage) -> Result<String> {
    let counted = |counts: &[(String, u64)], wanted: &str| {
        counts.iter().filter(|(name, _)| name == wanted).map(|(_, count)| count).sum::<u64>()
    };
    let kinds = ["startup successful", "liveness successful", "readiness successful"];
    wait("the probes", || match probe_counts(stage) {
        Ok(counts) if kinds.iter().all(|kind| counted(&counts, kind) > 0) => None,
        other => Some(format!("{other:?}")),
    })?;
    let counts = probe_counts(stage)?;
    let pod = agent(stage)?;
    ensure!(condition(&pod, "Ready"), "{}", pod["status"]);
    ensure!(
        !counts.iter().any(|(name, count)| name == "liveness failed" && *count > 0),
        "{counts:?}"
    );
    let said = counts.iter().filter(|(_, count)| *count > 0);
    let said: Vec<String> = said.map(|(name, count)| format!("{count} {name}")).collect();
    Ok(said.join(", "))
}

fn restart_of_kubelet(stage: &mut Stage) -> Result<String> {
    stage.start_client()?;
    let before = agent(stage)?;
    stage.machine.shell("systemctl restart kubelet.service")?;
    let path = format!("/api/v1/nodes/{NODE_NAME}/proxy/healthz");
    wait("the kubelet", || {
        let healthy = stage.kubectl.run(&format!("get --raw={path}"));
        healthy.err().map(|error| format!("{error:#}"))
    })?;
    thread::sleep(Duration::from_secs(20));
    let after = wait_agent(stage, "")?;
    ensure!(uid(&after) == uid(&before), "the agent's pod was replaced");
    let restarts = |pod: &Value| pod["status"]["containerStatuses"][0]["restartCount"].clone();
    ensure!(restarts(&after) == restarts(&before), "the agent was restarted");
    stage.end_client()?.said(false)
}

fn roll_out(stage: &mut Stage) -> Result<String> {
    let former = agent(stage)?;
    stage.start_client()?;
    stage.kubectl.run("rollout restart daemonset/kiam-agent --namespace=kube-system")?;
    stage.kubectl.run("rollout status daemonset/kiam-agent --namespace=kube-system")?;
    wait_agent(stage, uid(&former))?;
    stage.end_client()?.said(true)
}

fn delete_agent(stage: &mut Stage) -> Result<String> {
    let former = agent(stage)?;
    stage.start_client()?;
    stage.kubectl.run(&format!("delete pod {AGENT}"))?;
    wait_agent(stage, uid(&former))?;
    stage.end_client()?.said(true)
}

fn drain(stage: &mut Stage) -> Result<String> {
    for name in ["sidecar", "guaranteed"] {
        kind(stage, name, &["main"])?;
    }
    let packets = stage.packets_of_pods();
    let (before, agent_before) = (stage.pod("sidecar")?, agent(stage)?);
    stage.kubectl.run(&format!(
        "drain {NODE_NAME} --ignore-daemonsets --delete-emptydir-data --timeout=300s"
    ))?;
    let left = stage.pods("sidecar")?;
    let running = left.iter().filter(|pod| pod["status"]["phase"] == "Running").count();
    ensure!(running == 0, "{running} pods still run");
    ensure!(uid(&agent(stage)?) == uid(&agent_before), "the agent was drained");
    stage.kubectl.run(&format!("uncordon {NODE_NAME}"))?;
    for name in ["sidecar", "guaranteed"] {
        stage.ensure_first(name, "main", &own(name))?;
    }
    ensure!(stage.pod("sidecar")? != before, "the pod was not drained");
    ensure!(stage.packets_of_pods() == packets, "pods' packets came to the metadata service");
    Ok("the agent stays; pods that come after it: own role at the first try".into())
}

fn rights(stage: &mut Stage) -> Result<String> {
    let log = stage.plane.audit_log()?;
    let (mut asked, mut count) = (BTreeSet::new(), 0_u64);
    for line in log.lines() {
        // The last one may not be whole.
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        if entry["user"]["username"] != ACCOUNT {
            continue;
        }
        count += 1;
        let code = entry["responseStatus"]["code"].as_u64().unwrap_or_default();
        let words = ["verb", "requestURI"].map(|name| entry[name].as_str().unwrap_or_default());
        if matches!(code, 401 | 403) {
            bail!("{code} to {}", words.join(" "));
        }
        let object = entry["objectRef"]["resource"].as_str().unwrap_or(words[1]);
        asked.insert(format!("{} {object}", words[0]));
    }
    ensure!(count > 0, "the API server has heard nothing of {ACCOUNT}");
    let asked = asked.into_iter().collect::<Vec<_>>().join(", ");
    Ok(format!("{count} requests ({asked}), none refused"))
}

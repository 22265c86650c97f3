//! Losses of power, with pods that ask as their first act, and the agent's removal.

use std::{thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use super::{
    pods::{NAMESPACE, Try, own},
    rows::{agent, uid, wait_agent, wait_node_ready},
    stage::{Stage, wait},
};
use crate::node_vm::Owner;

const PODS: usize = 5;
/// What the agent leaves on a node, or may; each command says a line for each thing that is there.
const TRACES: &str = "
ls -A /sys/fs/bpf
ip -N -4 rule show | grep 'proto 107' || :
ip -N -6 rule show | grep 'proto 107' || :
tc qdisc show | grep clsact || :
ls -d /run/kiam 2>/dev/null || :
find /etc/systemd -name '*kiam*'";

fn early_pods(stage: &Stage) -> Result<Vec<(String, Vec<Try>)>> {
    let pods = stage.pods("early")?;
    ensure!(pods.len() == PODS, "{} pods ask", pods.len());
    let tries = pods.iter().map(|pod| {
        let name = pod["metadata"]["name"].as_str().context("a pod has a name")?;
        Ok((name.to_owned(), stage.tries(name, "main")?))
    });
    tries.collect()
}

fn restarts(stage: &Stage) -> Result<u64> {
    let pods = stage.pods("early")?;
    let counts =
        pods.iter().map(|pod| pod["status"]["containerStatuses"][0]["restartCount"].as_u64());
    Ok(counts.map(Option::unwrap_or_default).sum())
}

/// Ends the node's process and starts it again; how many pods got the node's credentials, and what the others were told first.
fn reboot(stage: &mut Stage) -> Result<(usize, Vec<String>)> {
    stage.apply("early.yaml")?;
    let stage_now = &*stage;
    wait("the pods' first answers", || match early_pods(stage_now) {
        Ok(pods)
            if pods.iter().all(|(_, tries)| tries.iter().any(|tried| tried.answer.is_ok())) =>
        {
            None
        }
        other => Some(format!("{other:?}")),
    })?;
    let before = restarts(stage)?;
    // What a runtime has written a while ago is on the disk.
    stage.machine.shell("sync")?;
    stage.machine.power_off()?;
    stage.machine.power_on()?;
    let stage_now = &*stage;
    wait("the pods' second lives", || match restarts(stage_now) {
        Ok(count) if count >= before + PODS as u64 => None,
        other => Some(format!("{other:?} restarts, {before} before")),
    })?;
    wait_node_ready(stage)?;
    wait_agent(stage, "")?;
    wait("the pods' answers", || match early_pods(stage_now) {
        Ok(pods)
            if pods.iter().all(|(_, tries)| tries.iter().any(|tried| tried.answer.is_ok())) =>
        {
            None
        }
        other => Some(format!("{other:?}")),
    })?;
    let (mut of_node, mut refusals) = (0, Vec::new());
    for (pod, tries) in early_pods(stage)? {
        if let Some(Err(said)) = tries.first().map(|first| &first.answer) {
            refusals.push(said.clone());
        }
        let answered = tries.iter().find(|tried| tried.answer.is_ok()).context("an answer")?;
        match stage.owner(answered.answer.as_deref().unwrap_or_default())? {
            Owner::Node => of_node += 1,
            _ => stage.ensure_owner(answered, &own("early")).context(pod)?,
        }
    }
    Ok((of_node, refusals))
}

pub(super) fn reboot_unguarded(stage: &mut Stage) -> Result<String> {
    let (of_node, refusals) = reboot(stage)?;
    // Without a guard the test must see what it looks for.
    ensure!(of_node > 0, "no pod came before the agent; {} were refused", refusals.len());
    Ok(format!("{of_node} of {PODS} pods got the node's credentials"))
}

pub(super) fn boot_guard_installed(stage: &mut Stage) -> Result<String> {
    let former = agent(stage)?;
    let folder = stage.kustomization(true)?;
    stage.kubectl.run(&format!("apply --kustomize={folder}"))?;
    stage.kubectl.run("rollout status daemonset/kiam-agent --namespace=kube-system")?;
    wait_agent(stage, uid(&former))?;
    let enabled = "systemctl is-enabled kiam-boot-guard.service";
    wait("the boot guard", || {
        stage.machine.shell(enabled).err().map(|error| format!("{error:#}"))
    })?;
    stage.kubectl.run(&format!("delete deployment early --namespace={NAMESPACE} --wait"))?;
    Ok("`systemctl is-enabled` says so".into())
}

pub(super) fn reboot_guarded(stage: &mut Stage) -> Result<String> {
    let before = stage.packets_of_pods();
    let (of_node, refusals) = reboot(stage)?;
    let packets = stage.packets_of_pods() - before;
    ensure!(of_node == 0, "{of_node} of {PODS} pods got the node's credentials");
    ensure!(packets == 0, "{packets} packets of pods came to the metadata service");
    let early = refusals.iter().filter(|said| said.contains("No route to host")).count();
    ensure!(early > 0, "no pod came before the agent: {refusals:?}");
    Ok(format!(
        "0 of {PODS} pods got the node's credentials; {early} came before the agent and were refused, all got their own role; \
         0 packets of pods to the metadata service"
    ))
}

pub(super) fn uninstall(stage: &mut Stage) -> Result<String> {
    let before = stage.machine.shell(TRACES)?;
    ensure!(
        before.contains("kiam") && before.contains("proto 107"),
        "the agent has left no trace: {before}"
    );
    let folder = stage.kustomization(true)?;
    let removal = xtask::command::workspace().join("deploy/uninstall");
    let removal = removal.to_str().context("a path is UTF-8")?.to_owned();
    stage.kubectl.run(&format!("delete --kustomize={folder}"))?;
    stage.kubectl.run(&format!("apply --kustomize={removal}"))?;
    let status =
        stage.kubectl.run("rollout status daemonset/kiam-uninstall --namespace=kube-system");
    status?;
    stage.kubectl.run(&format!("delete --kustomize={removal}"))?;
    let gone = |name: &str| stage.kubectl.get(&format!("{name} --all-namespaces"));
    for kind in ["daemonsets", "clusterroles", "clusterrolebindings", "serviceaccounts"] {
        let left = gone(kind)?;
        let names = left["items"].as_array().into_iter().flatten();
        let mut names = names.filter_map(|object| object["metadata"]["name"].as_str());
        if let Some(name) = names.find(|name| name.starts_with("kiam-")) {
            bail!("{name} is left among the {kind}");
        }
    }
    let left = stage.machine.shell(TRACES)?;
    ensure!(left.trim().is_empty(), "on the node is left: {left}");
    // Nothing intercepts any more: a pod that asks now reaches the metadata service.
    thread::sleep(Duration::from_secs(1));
    stage.apply("client.yaml")?;
    let first = || stage.tries("client", "main")?.into_iter().next().context("it has not asked");
    wait("a pod's answer", || first().err().map(|error| format!("{error:#}")))?;
    stage.ensure_owner(&first()?, &Owner::Node)?;
    Ok("no pins, rules, filters, state or units are left on the node, and no objects".into())
}

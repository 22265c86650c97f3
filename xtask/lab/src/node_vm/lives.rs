//! Pods whose records or containers are not as those of others: static pods, and containers that end again and again.

use anyhow::{Context, Result, ensure};
use lab::{
    NODE_NAME, PodSpec,
    fake::kubernetes::{NamespaceRecord, PodRecord},
    runtime::{Exited, Handler, Kubelet, Sandbox, Shape},
};

use super::{
    rows::{ROLE, asks, pod},
    stage::{NAMESPACE, Stage},
};

/// Where `--static-pod-namespaces` has static pods by default.
const STATIC: &str = "kube-system";
/// How often a container ends and is made again, and how often its sandbox.
const RESTARTS: u32 = 8;
const SANDBOXES: u32 = 3;
const CRASHES: &str = "\
/bin/busybox wget -qO- http://169.254.169.254/latest/meta-data/iam/security-credentials/orders
exit 3";

/// Runs the sandbox of a static pod, which the kubelet knows by a hash of its manifest, and whose mirror has another UID. Then
/// its container asks.
fn mirrored(stage: &Stage, kubelet: &Kubelet, namespace: &str, hash: &str) -> Result<Exited> {
    let name = stage.name("static");
    let mut spec = PodSpec::new(namespace, &name);
    spec.uid = Some(hash.to_owned());
    let sandbox = kubelet.run_sandbox_of(&spec, Shape::default(), Handler::Runc)?;
    let address = kubelet.address(&sandbox)?.context("a static pod has an address")?;
    let (start, end) = hash.split_at(12);
    let uid = format!("0f8fad5b-d9cb-469f-a165-{start}");
    ensure!(!uid.ends_with(end), "a mirror has a UID of its own");
    let mirror = PodRecord::scheduled(namespace, &name, &uid, NODE_NAME)
        .annotation("kubernetes.io/config.mirror", hash)
        .annotation("kubernetes.io/config.hash", hash)
        .annotation("iam.amazonaws.com/role", ROLE)
        .running(&[address]);
    stage.lab.kubernetes.apply_pod(&mirror);
    let exited = asks(kubelet, &sandbox, ("main", 0), ROLE)?;
    kubelet.remove(sandbox)?;
    stage.lab.kubernetes.delete_pod(namespace, &name);
    Ok(exited)
}

pub(super) fn mirror_pods(stage: &mut Stage) -> Result<String> {
    let kubelet = stage.kubelet()?;
    let permitted = ("iam.amazonaws.com/permitted".to_owned(), ".*".to_owned());
    let namespace =
        NamespaceRecord { annotations: vec![permitted], ..NamespaceRecord::new(STATIC) };
    stage.lab.kubernetes.store().apply_namespace(&namespace);
    for hash in ["5f6c3a1b2d4e5f60718293a4b5c6d7e8", "7a6c3a1b2d4e5f60718293a4b5c6d7e8"] {
        let exited = mirrored(stage, &kubelet, STATIC, hash)?;
        ensure!(exited.code == 0, "a static pod: {exited:?}");
        stage.ensure_role(&exited.output, ROLE)?;
    }
    let forger = mirrored(stage, &kubelet, NAMESPACE, "6f6c3a1b2d4e5f60718293a4b5c6d7e8")?;
    ensure!(forger.code != 0 && stage.owner(&forger.output).is_err(), "a forger: {forger:?}");
    Ok("2 of 2 static pods its own role; one that a tenant's record names nothing".to_owned())
}

/// Runs a container that asks and ends with an error, again and again.
fn crash(stage: &Stage, kubelet: &Kubelet, sandbox: &Sandbox, from: u32) -> Result<u32> {
    for attempt in from..from + RESTARTS {
        let command = ["/bin/sh", "-c", CRASHES];
        let container = kubelet.start(sandbox, ("main", attempt), &command)?;
        let exited = kubelet.wait(&container)?;
        ensure!(exited.code == 3, "attempt {attempt}: {exited:?}");
        let what = || format!("attempt {attempt}: {exited:?}");
        stage.ensure_role(&exited.output, ROLE).with_context(what)?;
    }
    Ok(RESTARTS)
}

pub(super) fn crash_loop(stage: &mut Stage) -> Result<String> {
    let kubelet = stage.kubelet()?;
    let (spec, mut sandbox) = stage.sandbox(&kubelet, pod(stage), Shape::default())?;
    stage.publish(&kubelet, &spec, &sandbox)?;
    let mut served = crash(stage, &kubelet, &sandbox, 0)?;
    for number in 1..SANDBOXES {
        // Its network goes with it; the pod's UID and cgroup stay.
        sandbox = kubelet.run_again(sandbox)?;
        stage.publish(&kubelet, &spec, &sandbox)?;
        served += crash(stage, &kubelet, &sandbox, number * RESTARTS)?;
    }
    stage.delete(&kubelet, &spec, sandbox)?;
    Ok(format!("{served} of {served} lives its own role, in {SANDBOXES} sandboxes of one pod"))
}

//! What is around the rows: the network, the stand-ins, the cluster.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use lab::{
    IMDS_V4, IMDS_V6, NODE_V4, NODE_V6, Netns,
    fake::{
        Place,
        imds::{Imds, NODE_ACCESS_KEY},
        sts::Sts,
    },
    has_ipv6,
    runtime::network_config,
};
use serde_json::json;
use tokio::time::Instant;

use super::{
    Parts,
    control_plane::{ControlPlane, SERVICE},
    image,
    kubectl::Kubectl,
    machine::{Machine, TAP, share_files},
    pods::NAMESPACE,
};
use crate::node_vm::share;
use xtask::command::workspace;

/// Whatever is waited for comes long before.
pub(super) const LIMIT: Duration = Duration::from_secs(600);
/// This end of the node's cable, where the API server and STS are.
pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 254);

/// A cluster with one node.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) sts: Sts,
    pub(super) imds: Imds,
    pub(super) plane: ControlPlane,
    pub(super) machine: Machine,
    pub(super) kubectl: Kubectl,
    /// What of which version, once the node is there.
    pub(super) versions: Vec<String>,
    folder: PathBuf,
}

// === impl Stage ===

impl Stage {
    /// Starts what is around the node, which has no power yet.
    pub(super) fn set(parts: &Parts, folder: &Path) -> Result<Self> {
        let netns = Netns::current()?;
        connect(&netns)?;
        let sts = Sts::start(Place::inside(&netns, (OUTSIDE, 0).into()), NODE_ACCESS_KEY)?;
        let imds = Imds::start(&netns)?;
        let mut plane = ControlPlane::start(&parts.programs, &folder.join("control-plane"))?;
        let shared = folder.join("lab");
        share_files(&shared)?;
        let node = shared.join("node");
        let program = parts.programs.join("kubelet");
        fs::copy(program, node.join("kubelet")).context("sharing the kubelet")?;
        fs::write(node.join("10-lab.conflist"), network_config()).context("for CNI")?;
        let config = plane.kubelet_config()?.to_string();
        fs::write(node.join("kubeconfig"), config).context("writing kubeconfig")?;
        share("kiam-agent", &shared)?;
        let (agent, disk) = (shared.join("kiam-agent"), parts.node.join("disk"));
        image::write(&agent, &disk, &node.join("images"))?;
        let kubectl = plane.kubectl();
        plane.ensure_runs()?;
        let machine = Machine::new(&parts.node, folder);
        let (versions, folder) = (Vec::new(), folder.to_owned());
        Ok(Self { sts, imds, plane, machine, kubectl, versions, folder })
    }

    /// Applies a file of `xtask/cluster/pods`.
    pub(super) fn apply(&self, name: &str) -> Result<()> {
        self.kubectl.run_words(&["apply", &filename(name)]).map(drop)
    }

    /// Deletes what such a file made, and waits until it is gone.
    pub(super) fn delete(&self, name: &str) -> Result<()> {
        self.kubectl.run_words(&["delete", &filename(name), "--cascade=foreground"]).map(drop)
    }

    /// Makes a kustomization of `deploy/` with what this cluster needs, and with a boot guard; its folder, as a word.
    pub(super) fn kustomization(&self, guarded: bool) -> Result<String> {
        let folder = self.folder.join("deploy");
        fs::create_dir_all(&folder).context("making a kustomization")?;
        // This version of Kubernetes has no `maxSurge` for DaemonSets; it came with 1.22.
        let mut patches = vec![json!({
            "op": "replace", "path": "/spec/updateStrategy",
            "value": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
        })];
        let flags = [
            format!("--sts-endpoint={}", self.sts.url()),
            format!("--static-pod-namespaces={NAMESPACE}"),
        ];
        let path = "/spec/template/spec/containers/0/args/-";
        patches.extend(flags.map(|flag| json!({"op": "add", "path": path, "value": flag})));
        if guarded {
            let guard = include_str!("../../../../deploy/boot-guard/daemonset-patch.yaml");
            let guard: Vec<_> = serde_saphyr::from_str(guard).context("reading a patch")?;
            patches.extend(guard);
        }
        let target =
            json!({"group": "apps", "version": "v1", "kind": "DaemonSet", "name": "kiam-agent"});
        // JSON is YAML. This version of kustomize takes no absolute paths, and no components.
        let text = json!({
            "bases": ["../../../../deploy"],
            "patchesJson6902": [{"target": target, "path": "patch.yaml"}],
        });
        fs::write(folder.join("kustomization.yaml"), text.to_string()).context("writing it")?;
        let patches = serde_json::to_string(&patches).context("as JSON")?;
        fs::write(folder.join("patch.yaml"), patches).context("writing a patch")?;
        Ok(folder.display().to_string())
    }

    /// Packets to the metadata service that came from pods.
    pub(super) fn packets_of_pods(&self) -> u64 {
        self.imds.attackers_packets().values().sum()
    }
}

fn filename(name: &str) -> String {
    format!("--filename={}", workspace().join("xtask/cluster/pods").join(name).display())
}

/// Makes this end of the node's cable: where the service's addresses are, the API server, and STS.
fn connect(netns: &Netns) -> Result<()> {
    netns.ip(&format!(
        "link set lo up\n\
         addr add {SERVICE}/32 dev lo\n\
         tuntap add dev {TAP} mode tap\n\
         link set {TAP} up\n\
         addr add {OUTSIDE}/32 dev {TAP}\n\
         addr add {IMDS_V4}/32 dev {TAP}\n\
         route add {NODE_V4} dev {TAP}\n\
         route add default via {NODE_V4}\n"
    ))?;
    if !has_ipv6() {
        return Ok(());
    }
    netns.ip(&format!(
        "addr add {IMDS_V6}/128 dev {TAP} nodad\n\
         addr add fd77::ffff:fe/128 dev {TAP} nodad\n\
         route add {NODE_V6} dev {TAP}\n\
         route add ::/0 via {NODE_V6} dev {TAP}\n"
    ))
}

/// Waits until `missing` is `None`.
pub(super) fn wait(what: &str, missing: impl Fn() -> Option<String>) -> Result<()> {
    let begun = Instant::now();
    while let Some(reason) = missing() {
        if begun.elapsed() > LIMIT {
            bail!("{what}: {reason} after {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(300));
    }
    Ok(())
}

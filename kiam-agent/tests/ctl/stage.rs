//! A cluster of an API server and agents on loopback, and the laptop.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use lab::{
    fake::{
        Place,
        imds::NODE_ACCESS_KEY,
        kubernetes::{Container, Kubernetes, NamespaceRecord, PodRecord},
        sts::Sts,
    },
    loopback::LoopbackAgent,
    role_base_arn,
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
pub(crate) const CTL: &str = env!("CARGO_BIN_EXE_kubectl-kiam");
/// Where the agents' pods are.
pub(crate) const AGENTS: &str = "kube-system";

/// The cluster, and what it depends on.
pub(crate) struct Cluster {
    pub(crate) kubernetes: Kubernetes,
    pub(crate) sts: Sts,
    pub(crate) laptop: TempDir,
}

/// What a command on the laptop printed, and its exit status.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) text: String,
    pub(crate) errors: String,
}

impl Cluster {
    pub(crate) fn start() -> Self {
        let kubernetes = Kubernetes::start(Place::loopback()).unwrap();
        let laptop = tempfile::tempdir().unwrap();
        kubernetes.write_kubeconfig(&laptop.path().join("config")).unwrap();
        let sts = Sts::start(Place::loopback(), NODE_ACCESS_KEY).unwrap();
        Self { kubernetes, sts, laptop }
    }

    /// A node with an agent that runs, and the agent's pod.
    pub(crate) fn agent(&self, node: &str, further: &[&str]) -> LoopbackAgent {
        self.agent_of(node, &self.kubernetes, &self.sts.url(), further)
    }

    /// The same, of an agent that has another API server, or another STS.
    pub(crate) fn agent_of(
        &self,
        node: &str,
        kubernetes: &Kubernetes,
        sts: &str,
        further: &[&str],
    ) -> LoopbackAgent {
        let folder = tempfile::tempdir().unwrap();
        kubernetes.write_kubeconfig(&folder.path().join("kubeconfig")).unwrap();
        let name = format!("--node-name={node}");
        let base = format!("--role-base-arn={}", role_base_arn());
        let flags = [&[base.as_str(), name.as_str()], further].concat();
        let signer = Some(NODE_ACCESS_KEY);
        self.node(node, json!({}));
        self.pod_of_agent(node, &json!({ "state": { "running": {} }, "ready": true }));
        self.contain(node, folder.path(), Path::new(AGENT));
        LoopbackAgent::start(folder, sts, signer, &flags).unwrap()
    }

    /// Lets commands run in the pod of a node's agent.
    pub(crate) fn contain(&self, node: &str, folder: &Path, program: &Path) {
        let state = folder.join("state").display().to_string();
        let container = Container {
            name: "kiam-agent".to_owned(),
            programs: [("kiam-agent".to_owned(), program.to_owned())].into(),
            environment: vec![("KIAM_STATE_DIR".to_owned(), state)],
            log: folder.join("log"),
            former_log: Some(folder.join("former-log")).filter(|path| path.exists()),
        };
        self.kubernetes.run_container(AGENTS, &agent_pod(node), container);
    }

    /// A node of this name, with more fields of its record.
    pub(crate) fn node(&self, name: &str, mut fields: Value) {
        fields["kind"] = json!("Node");
        fields["metadata"]["name"] = json!(name);
        self.kubernetes.apply_node_object(fields);
    }

    /// The pod of a node's agent, with its container's status.
    pub(crate) fn pod_of_agent(&self, node: &str, container: &Value) {
        let mut container = container.clone();
        container["name"] = json!("kiam-agent");
        self.kubernetes.apply_pod_object(json!({
            "kind": "Pod", "apiVersion": "v1",
            "metadata": {
                "namespace": AGENTS, "name": agent_pod(node), "uid": uid(node),
                "labels": { "app.kubernetes.io/name": "kiam-agent" },
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": { "nodeName": node, "containers": [{ "name": "kiam-agent" }] },
            "status": { "phase": "Running", "containerStatuses": [container] },
        }));
    }

    pub(crate) fn namespace(&self, name: &str, annotations: &[(&str, &str)]) {
        let namespace = annotations.iter().fold(NamespaceRecord::new(name), |it, (key, value)| {
            it.annotation(&format!("iam.amazonaws.com/{key}"), value)
        });
        self.kubernetes.apply_namespace(&namespace);
    }

    /// Runs a command on the laptop.
    pub(crate) fn ctl(&self, words: &[&str]) -> Said {
        Said::of(self.command(words).output().unwrap())
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(CTL);
        command.args(words).env_clear().stdin(Stdio::null());
        command.env("KUBECONFIG", self.laptop.path().join("config"));
        command
    }

    /// As [`Self::ctl`], as JSON.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let said = self.ctl(&[words, &["--output=json"]].concat());
        serde_json::from_str(&said.text).unwrap_or_else(|error| panic!("{error}: {said:?}"))
    }

    /// As [`Self::ctl`], on a terminal with so many columns.
    pub(crate) fn on_terminal(&self, columns: u16, words: &[&str]) -> String {
        let line = format!("stty cols {columns} rows 50; {CTL} {}", words.join(" "));
        let typescript = self.laptop.path().join("typescript");
        let mut command = Command::new("script");
        command.args(["--quiet", "--flush", "--command", &line]).arg(&typescript);
        command.env_remove("NO_COLOR").env("TERM", "xterm").stdin(Stdio::null());
        command.env("KUBECONFIG", self.laptop.path().join("config"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().replace("\r\n", "\n")
    }
}

impl Said {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), text: text(output.stdout), errors: text(output.stderr) }
    }
}

pub(crate) fn agent_pod(node: &str) -> String {
    format!("kiam-agent-{node}")
}

/// The UID of the pod of a node's agent.
fn uid(node: &str) -> String {
    let number = node.bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31) + u32::from(byte));
    format!("{number:08x}-0000-4000-8000-00000000a6e7")
}

/// A pod on `node`, at an address of its own of loopback.
pub(crate) fn pod(node: &str, namespace: &str, name: &str, number: u8) -> PodRecord {
    let uid = format!("{number:08x}-0000-4000-8000-000000000000");
    PodRecord::scheduled(namespace, name, &uid, node).running(&[[127, 77, 1, number].into()])
}

/// A program that is a shell script.
pub(crate) fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

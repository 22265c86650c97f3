//! The node from inside: what is around it, its runtime, and pods that ask.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use lab::{
    Lab, Node, PodSpec,
    fake::{
        imds::{NODE_ACCESS_KEY, NODE_ROLE},
        kubernetes::NamespaceRecord,
        sts::Sts,
    },
    role_arn,
    runtime::{self, CgroupDriver, Handler, Kubelet, Sandbox, Shape},
};
use serde_json::Value;
use tokio::time::Instant;

use super::{agent_pod::AgentPod, power::Early};
use xtask::command::printed;

/// Whatever is waited for comes long before.
pub(super) const LIMIT: Duration = Duration::from_secs(400);
/// The namespace of the pods that ask.
pub(super) const NAMESPACE: &str = "shop";
pub(super) const SOCKET: &str = "/run/containerd/containerd.sock";
/// Containers' logs, which outlive the node.
const LOGS: &str = "/lab/pods";
const ADMIN: &str = "127.0.0.1:3101";

/// The node, with an agent once it was started.
pub(super) struct Stage {
    pub(super) lab: Lab,
    pub(super) agent: Option<AgentPod>,
    /// Pods that came before the agent.
    pub(super) early: Vec<Early>,
    names: AtomicU32,
}

/// Whose credentials a pod got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The node's.
    Node,
    /// Those of a role, by its ARN.
    Role(String),
}

// === impl Stage ===

impl Stage {
    /// Starts what is around the node, and waits for the runtime.
    pub(super) fn set() -> Result<Self> {
        let lab = Lab::around(Node::of_machine()?)?;
        let permitted = ("iam.amazonaws.com/permitted".to_owned(), ".*".to_owned());
        let namespace =
            NamespaceRecord { annotations: vec![permitted], ..NamespaceRecord::new(NAMESPACE) };
        lab.kubernetes.store().apply_namespace(&namespace);
        fs::write("/etc/cni/net.d/10-lab.conflist", runtime::network_config())
            .context("for CNI")?;
        let stage = Self { lab, agent: None, early: Vec::new(), names: AtomicU32::new(0) };
        wait("containerd", || runtime::unready(Path::new(SOCKET)))?;
        let folder = stage.lab.node.folder().join("image");
        fs::create_dir_all(&folder).context("making a folder for the image")?;
        runtime::import(Path::new(SOCKET), &folder)?;
        Ok(stage)
    }

    /// A connection to the runtime, for one thread.
    pub(super) fn kubelet(&self) -> Result<Kubelet> {
        connect(&self.lab.node)
    }

    /// A name that no other pod had.
    pub(super) fn name(&self, base: &str) -> String {
        format!("{base}-{}", self.names.fetch_add(1, Ordering::Relaxed))
    }

    /// Schedules a pod with a role, and runs its sandbox. The API has its address a little later, as from a kubelet.
    pub(super) fn sandbox(
        &self,
        kubelet: &Kubelet,
        spec: PodSpec,
        shape: Shape,
    ) -> Result<(PodSpec, Sandbox)> {
        let spec = self.lab.schedule(spec)?;
        let sandbox = kubelet.run_sandbox_of(&spec, shape, Handler::Runc)?;
        Ok((spec, sandbox))
    }

    /// Tells the API the sandbox's address.
    pub(super) fn publish(
        &self,
        kubelet: &Kubelet,
        spec: &PodSpec,
        sandbox: &Sandbox,
    ) -> Result<()> {
        let address = kubelet.address(sandbox)?;
        let address = address.unwrap_or(lab::NODE_V4.into());
        self.lab.publish_of(spec, &[address]);
        Ok(())
    }

    /// Takes a pod away, first on the node.
    pub(super) fn delete(&self, kubelet: &Kubelet, spec: &PodSpec, sandbox: Sandbox) -> Result<()> {
        kubelet.remove(sandbox)?;
        self.lab.kubernetes.delete_pod(&spec.namespace, &spec.name);
        Ok(())
    }

    /// Whose the credentials in an answer are.
    pub(super) fn owner(&self, answer: &str) -> Result<Owner> {
        Owner::of(answer, &self.lab.sts)
    }

    /// Fails unless the answer has the credentials of `role`.
    pub(super) fn ensure_role(&self, answer: &str, role: &str) -> Result<()> {
        let owner = self.owner(answer)?;
        ensure!(owner == Owner::Role(role_arn(role)), "not {role}'s but {owner:?}");
        Ok(())
    }

    /// The agent that serves.
    pub(super) fn agent(&mut self) -> Result<&mut AgentPod> {
        self.agent.as_mut().context("no agent was started")
    }

    /// A counter or gauge of the agent's; 0 before it is counted.
    pub(super) fn metric(&self, name: &str) -> Result<u64> {
        let metrics = admin("/metrics")?;
        let found = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found
            .map_or(Ok(0), |value| value.trim().parse().with_context(|| format!("{name}: {value}")))
    }

    /// Connects that went to the node's listener, and those to listeners inside pods.
    pub(super) fn ways(&self) -> Result<(u64, u64)> {
        let verdicts = |verdict| {
            self.metric(&format!("kiam_intercept_verdicts_total{{verdict=\"{verdict}\"}}"))
        };
        Ok((verdicts("redirected")?, verdicts("redirected_inside")?))
    }
}

// === impl Owner ===

impl Owner {
    /// Of the credentials in an answer.
    pub(crate) fn of(answer: &str, sts: &Sts) -> Result<Self> {
        let answer: Value = serde_json::from_str(answer.trim())
            .with_context(|| format!("these are no credentials: {answer:?}"))?;
        let key = answer["AccessKeyId"].as_str().unwrap_or_default();
        if key == NODE_ACCESS_KEY {
            return Ok(Self::Node);
        }
        let issued = sts.owner(key).context("nobody issued these credentials")?;
        Ok(Self::Role(issued.role))
    }
}

/// A connection to the runtime of `node`, for one thread.
pub(super) fn connect(node: &Node) -> Result<Kubelet> {
    Kubelet::connect(Path::new(SOCKET), node, LOGS.into(), CgroupDriver::Systemd)
}

/// Asks the agent's endpoint for operators.
pub(super) fn admin(path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(ADMIN).context("connecting to the agent's admin port")?;
    stream.set_read_timeout(Some(LIMIT)).context("setting a timeout")?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).context("asking the agent")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("reading the agent's answer")?;
    Ok(answer)
}

/// Waits until `missing` is `None`.
pub(super) fn wait(what: &str, missing: impl Fn() -> Option<String>) -> Result<()> {
    let begun = Instant::now();
    while let Some(reason) = missing() {
        if begun.elapsed() > LIMIT {
            bail!("{what}: {reason} after {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// What a program of the node prints, if it succeeds.
pub(super) fn output(program: &str, arguments: &[&str]) -> Result<String> {
    printed(Command::new(program).args(arguments)).with_context(|| format!("{arguments:?}"))
}

/// The route guard's rules of both families, by its mark. The filter of `ip rule` shows the kernel's own rules too.
pub(super) fn guard_rules() -> Result<Vec<String>> {
    let of = |family| output("ip", &["-N", family, "rule", "show"]);
    let rules = of("-4")? + &of("-6")?;
    let own = rules.lines().filter(|rule| rule.contains(" proto 107"));
    Ok(own.map(ToOwned::to_owned).collect())
}

/// A command that asks once for the credentials of `role`, as the first thing it does.
pub(super) fn ask(role: &str) -> [String; 4] {
    let url = format!("http://169.254.169.254/latest/meta-data/iam/security-credentials/{role}");
    ["/bin/busybox", "wget", "-qO-", &url].map(ToOwned::to_owned)
}

/// The node's own role, which hostNetwork pods have.
pub(super) const OF_NODE: &str = NODE_ROLE;

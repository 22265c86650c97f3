//! The agent as the DaemonSet runs it, but for its image: a pod of the node's runtime.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result, bail};
use lab::{
    NODE_NAME, NODE_V4, Node, PodSpec,
    fake::imds::REGION,
    runtime::{Bind, Container, Handler, Kubelet, Processes, Sandbox, Shape},
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::{
    manifest::Manifest,
    stage::{LIMIT, Stage, connect},
};

/// The agent's program on the node.
pub(super) const PROGRAM: &str = "/opt/lab/kiam-agent";
/// Libraries and certificates, which its image would have.
const IMAGE: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ssl", "/opt/lab"];
/// Between two probes.
const PROBE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(100);

/// One agent's pod.
pub(super) struct AgentPod {
    node: Node,
    spec: PodSpec,
    sandbox: Sandbox,
    container: Container,
    manifest: Manifest,
    /// How often the container was made.
    attempts: u32,
}

// === impl AgentPod ===

impl AgentPod {
    /// Starts one, with flags beside those of `deploy/` and the node's files that they need.
    pub(super) fn start(stage: &Stage, further: &[&str], binds: &[Bind]) -> Result<Self> {
        let kubelet = stage.kubelet()?;
        let mut manifest = Manifest::agent(NODE_NAME, &NODE_V4.to_string())?;
        manifest.args.extend([
            format!("--kubeconfig={}", stage.lab.kubeconfig()?.display()),
            format!("--sts-endpoint={}", stage.lab.sts.url()),
            format!("--region={REGION}"),
        ]);
        manifest.args.extend(further.iter().map(|&flag| flag.to_owned()));
        let folder = stage.lab.node.folder().display().to_string();
        manifest.binds.extend(IMAGE.into_iter().chain([&*folder]).map(Bind::same));
        manifest.binds.extend_from_slice(binds);
        let spec = PodSpec::new("kube-system", &stage.name("kiam-agent")).host_network();
        let spec = stage.lab.schedule(spec)?;
        let sandbox = kubelet.run_sandbox_of(&spec, shape(), Handler::Runc)?;
        stage.lab.publish_of(&spec, &[NODE_V4.into()]);
        let container = run(&kubelet, &sandbox, 0, &manifest)?;
        let node = stage.lab.node.clone();
        Ok(Self { node, spec, sandbox, container, manifest, attempts: 1 })
    }

    /// Waits until its readiness probe says so; how long that took.
    pub(super) fn wait_ready(&self) -> Result<Duration> {
        let begun = Instant::now();
        let words = self.manifest.probe.iter().map(|word| &**word);
        let probe: Vec<&str> = [PROGRAM].into_iter().chain(words).collect();
        loop {
            let kubelet = self.kubelet()?;
            let said = match kubelet.execute(&self.container, &probe) {
                Ok(exited) if exited.code == 0 => return Ok(begun.elapsed()),
                Ok(exited) => exited.output,
                Err(error) => format!("{error:#}"),
            };
            if kubelet.ended(&self.container)? || begun.elapsed() > LIMIT {
                bail!("the agent is not ready: {said}; it said:\n{}", self.log()?);
            }
            thread::sleep(PROBE);
        }
    }

    /// Waits until its log says `text`.
    pub(super) fn wait_said(&self, text: &str) -> Result<()> {
        let begun = Instant::now();
        while !self.log()?.contains(text) {
            if begun.elapsed() > LIMIT {
                bail!("the agent did not say {text:?} in {LIMIT:?}, but:\n{}", self.log()?);
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// A connection of its own each time, as the runtime may have been restarted.
    fn kubelet(&self) -> Result<Kubelet> {
        connect(&self.node)
    }

    /// What its containers' last one has written.
    pub(super) fn log(&self) -> Result<String> {
        self.kubelet()?.output(&self.container)
    }

    /// Asks it to end, as the kubelet does, and waits until it has.
    pub(super) fn end(self, stage: &Stage) -> Result<()> {
        self.kubelet()?.end(&self.container, 30)?;
        self.kubelet()?.remove(self.sandbox)?;
        stage.lab.kubernetes.delete_pod(&self.spec.namespace, &self.spec.name);
        Ok(())
    }

    /// `kill -9`.
    pub(super) fn kill(&self) -> Result<()> {
        let scope = format!("cri-containerd-{}.scope", self.container.id());
        let procs = self.sandbox.cgroup().join(scope).join("cgroup.procs");
        let procs = fs::read_to_string(&procs).context("finding the agent's processes")?;
        for process in procs.lines() {
            let process = process.parse().ok().and_then(Pid::from_raw);
            kill_process(process.context("a process has a number")?, Signal::KILL)?;
        }
        self.kubelet()?.wait(&self.container).map(drop)
    }

    /// Makes the container anew, as the kubelet does when it has ended.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.container = run(&self.kubelet()?, &self.sandbox, self.attempts, &self.manifest)?;
        self.attempts += 1;
        Ok(())
    }
}

/// `kiam-agent uninstall` as the DaemonSet of `deploy/uninstall` runs it; what it printed.
pub(super) fn uninstall(stage: &Stage) -> Result<String> {
    let kubelet = stage.kubelet()?;
    let mut manifest = Manifest::uninstall()?;
    manifest.binds.extend(IMAGE.map(Bind::same));
    let spec = PodSpec::new("kube-system", &stage.name("kiam-uninstall")).host_network();
    let spec = stage.lab.schedule(spec)?;
    let sandbox = kubelet.run_sandbox_of(&spec, shape(), Handler::Runc)?;
    let container = run(&kubelet, &sandbox, 0, &manifest)?;
    let exited = kubelet.wait(&container)?;
    kubelet.remove(sandbox)?;
    match exited.code {
        0 => Ok(exited.output),
        code => bail!("uninstall ended with {code}: {}", exited.output),
    }
}

/// `hostPID` and `privileged`.
fn shape() -> Shape {
    Shape { processes: Processes::Node, privileged: true, ..Shape::default() }
}

fn run(
    kubelet: &Kubelet,
    sandbox: &Sandbox,
    attempt: u32,
    manifest: &Manifest,
) -> Result<Container> {
    for bind in &manifest.binds {
        // `DirectoryOrCreate`; what is there stays.
        if !Path::new(&bind.node).exists() {
            fs::create_dir_all(&bind.node).with_context(|| format!("making {}", bind.node))?;
        }
    }
    let words = manifest.args.iter().map(|word| &**word);
    let command: Vec<&str> = [PROGRAM].into_iter().chain(words).collect();
    kubelet.start_with(sandbox, ("kiam-agent", attempt), &command, &manifest.binds)
}

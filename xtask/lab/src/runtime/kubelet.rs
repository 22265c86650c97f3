//! What the kubelet does with a runtime: a pod's cgroup, its sandbox, its containers, in the kubelet's order.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use tokio::time::Instant;

use super::{
    containerd::Handler,
    cri::Cri,
    image,
    messages::{
        ContainerConfig, ContainerMetadata, ContainerRequest, ContainerState, ContainerStatus,
        ContainerStatusResponse, CreateContainerRequest, CreateContainerResponse, ExecSyncRequest,
        ExecSyncResponse, ImageSpec, LinuxContainerConfig, LinuxContainerSecurityContext,
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Nothing, PodSandboxConfig,
        PodSandboxMetadata, PodSandboxRequest, PodSandboxStatusRequest, PodSandboxStatusResponse,
        RunPodSandboxRequest, RunPodSandboxResponse, VersionResponse,
    },
    shape::{Bind, CgroupDriver, Shape},
};
use crate::{cgroup::Cgroup, node::Node, pod::PodSpec};

/// How long a container of the lab may run until it has ended: a moment, but on a node that is very busy.
const END: Duration = Duration::from_secs(240);
/// Between two looks at whether it has, each of which costs the runtime some work.
const LOOK: Duration = Duration::from_millis(20);

/// A kubelet's connection to the runtime.
#[derive(Debug)]
pub struct Kubelet {
    cri: Cri,
    node: Node,
    /// Where containers' logs are.
    logs: PathBuf,
    cgroups: CgroupDriver,
}

/// A pod's sandbox. The pod's cgroup goes with this value, and what runs in it is killed then: stop it before.
#[derive(Debug)]
pub struct Sandbox {
    id: String,
    config: PodSandboxConfig,
    handler: Handler,
    /// The pod's; the sandbox's and the containers' are below.
    cgroup: Cgroup,
}

/// A container of a sandbox.
#[derive(Clone, Debug)]
pub struct Container {
    id: String,
    log: PathBuf,
}

/// What came of a process.
#[derive(Clone, Debug)]
pub struct Exited {
    /// 0: it succeeded.
    pub code: i32,
    /// What it wrote to stdout and stderr.
    pub output: String,
    /// When the runtime read the first line of that; `None` without one, and of what was executed in a container.
    pub first_line: Option<Timestamp>,
}

// === impl Kubelet ===

impl Kubelet {
    /// Connects to the runtime that listens at `socket`, for one thread, and keeps containers' logs in `logs`.
    pub fn connect(
        socket: &Path,
        node: &Node,
        logs: PathBuf,
        cgroups: CgroupDriver,
    ) -> Result<Self> {
        Ok(Self { cri: Cri::connect(socket)?, node: node.clone(), logs, cgroups })
    }

    /// The runtime's name and version.
    pub fn version(&self) -> Result<String> {
        let answer: VersionResponse = self.cri.call("Version", &Nothing {})?;
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    /// Makes the pod's cgroup and runs its sandbox: its network, and the process that holds it.
    pub fn run_sandbox(&self, spec: &PodSpec, handler: Handler) -> Result<Sandbox> {
        self.run_sandbox_of(spec, Shape::default(), handler)
    }

    /// The same for a pod of another shape.
    pub fn run_sandbox_of(
        &self,
        spec: &PodSpec,
        shape: Shape,
        handler: Handler,
    ) -> Result<Sandbox> {
        let uid = spec.uid.as_deref().context("a pod has its UID from the API")?;
        let (cgroup, cgroup_parent) = self.cgroups.create(&self.node, spec, uid)?;
        let name = format!("{}_{}_{uid}", spec.namespace, spec.name);
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: spec.name.clone(),
                uid: uid.to_owned(),
                namespace: spec.namespace.clone(),
                attempt: 0,
            }),
            hostname: if spec.host_network { String::new() } else { spec.name.clone() },
            log_directory: self.logs.join(name).display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent,
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(shape.namespaces(spec.host_network)),
                    privileged: shape.privileged,
                }),
            }),
        };
        self.run(config, handler, cgroup)
    }

    /// Makes the sandbox anew, as the kubelet does when the old one's process ended; that one is removed.
    pub fn run_again(&self, sandbox: Sandbox) -> Result<Sandbox> {
        self.stop(&sandbox)?;
        let Sandbox { id, mut config, handler, cgroup } = sandbox;
        let _: Nothing =
            self.cri.call("RemovePodSandbox", &PodSandboxRequest { pod_sandbox_id: id })?;
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt += 1;
        }
        self.run(config, handler, cgroup)
    }

    fn run(&self, config: PodSandboxConfig, handler: Handler, cgroup: Cgroup) -> Result<Sandbox> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.name().to_owned(),
        };
        let answer: RunPodSandboxResponse = self.cri.call("RunPodSandbox", &request)?;
        Ok(Sandbox { id: answer.pod_sandbox_id, config, handler, cgroup })
    }

    /// The address that the sandbox got; on the host's network none.
    pub fn address(&self, sandbox: &Sandbox) -> Result<Option<IpAddr>> {
        let request =
            PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), verbose: false };
        let answer: PodSandboxStatusResponse = self.cri.call("PodSandboxStatus", &request)?;
        let network = answer.status.context("a sandbox without a status")?.network;
        let address = network.map(|network| network.ip).filter(|address| !address.is_empty());
        address.map(|address| address.parse().context("reading the sandbox's address")).transpose()
    }

    /// Creates a container and starts `command` as its first process. `attempt` tells those of one name apart.
    pub fn start(
        &self,
        sandbox: &Sandbox,
        container: (&str, u32),
        command: &[&str],
    ) -> Result<Container> {
        self.start_with(sandbox, container, command, &[])
    }

    /// The same with files of the node.
    pub fn start_with(
        &self,
        sandbox: &Sandbox,
        (name, attempt): (&str, u32),
        command: &[&str],
        binds: &[Bind],
    ) -> Result<Container> {
        let log = format!("{name}-{attempt}.log");
        let security = sandbox.config.linux.as_ref().and_then(|of| of.security_context.clone());
        let security = security.context("a sandbox is made with a security context")?;
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt }),
            image: Some(ImageSpec { image: image::NAME.to_owned() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            mounts: binds.iter().map(Bind::mount).collect(),
            log_path: log.clone(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    privileged: security.privileged,
                    namespace_options: security.namespace_options,
                }),
            }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.id.clone(),
            config: Some(config),
            sandbox_config: Some(sandbox.config.clone()),
        };
        let answer: CreateContainerResponse = self.cri.call("CreateContainer", &request)?;
        let log = Path::new(&sandbox.config.log_directory).join(log);
        let container = Container { id: answer.container_id, log };
        let _: Nothing = self.cri.call("StartContainer", &container.request())?;
        Ok(container)
    }

    /// Whether the container's first process has ended.
    pub fn ended(&self, container: &Container) -> Result<bool> {
        Ok(self.status(container)?.state == ContainerState::Exited as i32)
    }

    /// What the container has written until now.
    pub fn output(&self, container: &Container) -> Result<String> {
        let log = fs::read_to_string(&container.log);
        Ok(read(&log.with_context(|| format!("reading {}", container.log.display()))?)?.0)
    }

    /// Asks the container's first process to end, and kills it after so many seconds.
    pub fn end(&self, container: &Container, seconds: i64) -> Result<()> {
        let request = ContainerRequest { timeout: seconds, ..container.request() };
        let _: Nothing = self.cri.call("StopContainer", &request)?;
        Ok(())
    }

    /// Waits until the container's first process has ended.
    pub fn wait(&self, container: &Container) -> Result<Exited> {
        let begun = Instant::now();
        let status = loop {
            let status = self.status(container)?;
            if status.state == ContainerState::Exited as i32 {
                break status;
            }
            if begun.elapsed() > END {
                bail!("the container runs on after {END:?}: {status:?}");
            }
            thread::sleep(LOOK);
        };
        if !matches!(status.reason.as_str(), "Completed" | "Error") {
            bail!("the container ended by {}: {}", status.reason, status.message);
        }
        let log = fs::read_to_string(&container.log);
        let log = log.with_context(|| format!("reading {}", container.log.display()))?;
        let (output, first_line) = read(&log)?;
        Ok(Exited { code: status.exit_code, output, first_line })
    }

    /// Runs `command` in a running container and waits for its end, as a probe does.
    pub fn execute(&self, container: &Container, command: &[&str]) -> Result<Exited> {
        let request = ExecSyncRequest {
            container_id: container.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 30,
        };
        let answer: ExecSyncResponse = self.cri.call("ExecSync", &request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let output = text(&answer.stdout) + &text(&answer.stderr);
        Ok(Exited { code: answer.exit_code, output, first_line: None })
    }

    /// Ends everything in the sandbox and takes its network away.
    pub fn stop(&self, sandbox: &Sandbox) -> Result<()> {
        let request = PodSandboxRequest { pod_sandbox_id: sandbox.id.clone() };
        let _: Nothing = self.cri.call("StopPodSandbox", &request)?;
        Ok(())
    }

    /// Stops the sandbox, removes it and the pod's cgroup.
    pub fn remove(&self, sandbox: Sandbox) -> Result<()> {
        self.stop(&sandbox)?;
        let request = PodSandboxRequest { pod_sandbox_id: sandbox.id.clone() };
        let _: Nothing = self.cri.call("RemovePodSandbox", &request)?;
        self.cgroups.remove(&sandbox.cgroup)
    }

    fn status(&self, container: &Container) -> Result<ContainerStatus> {
        let answer: ContainerStatusResponse =
            self.cri.call("ContainerStatus", &container.request())?;
        answer.status.context("a container without a status")
    }
}

// === impl Sandbox ===

impl Sandbox {
    /// The pod's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }
}

// === impl Container ===

impl Container {
    /// The runtime's id of it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    fn request(&self) -> ContainerRequest {
        ContainerRequest { container_id: self.id.clone(), timeout: 0 }
    }
}

/// What a container's log has: lines of a time, a stream, `F` or (where the line goes on) `P`, and text.
fn read(log: &str) -> Result<(String, Option<Timestamp>)> {
    let (mut output, mut first_line) = (String::new(), None);
    for line in log.lines() {
        let mut fields = line.splitn(4, ' ');
        let fields = (fields.next(), fields.next(), fields.next(), fields.next());
        let (Some(time), Some(_), Some(tag), Some(text)) = fields else {
            bail!("no line of a container's log: {line:?}");
        };
        if first_line.is_none() {
            first_line = Some(time.parse().context("reading the time of a log's line")?);
        }
        output += text;
        if tag == "F" {
            output.push('\n');
        }
    }
    Ok((output, first_line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_log_is_read_as_the_kubelet_reads_it() {
        let log = "2026-01-02T03:04:05.678901234Z stdout P {\"a\":\n\
                   2026-01-02T03:04:05.678901235Z stdout F  1}\n\
                   2026-01-02T03:04:06Z stderr F \n";
        let (output, first_line) = read(log).unwrap();
        assert_eq!(output, "{\"a\": 1}\n\n");
        assert_eq!(first_line, Some("2026-01-02T03:04:05.678901234Z".parse().unwrap()));
        assert!(read("nonsense\n").is_err());
    }
}

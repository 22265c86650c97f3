//! The real agent's binary, running on the lab's node.

use std::{
    ffi::OsString,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::{
    fake::imds::REGION,
    node::{NODE_NAME, NODE_V4, Node},
    process::Process,
    world::{Lab, role_base_arn},
};
use crate::{
    ask::agent_binary,
    pod_client::wire::{Reply, exchange},
};

/// The agent's own port; pods are redirected here.
pub const AGENT_PORT: u16 = 3100;
pub(super) const ADMIN: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 3101);
/// Nothing takes so long but a mistake, on a slow machine too.
pub const READY_LIMIT: Duration = Duration::from_secs(120);

/// One run of the agent.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    node: Node,
}

// === impl Agent ===

impl Agent {
    /// Starts `binary` with the flags of a plain installation and `further` ones.
    pub fn start(lab: &Lab, binary: &Path, further: &[&str]) -> Result<Self> {
        Self::start_by(lab.node.command(binary)?, lab, further)
    }

    /// Starts it by `command`, which ends in the agent's binary, such as one of a pod's.
    pub fn start_by(mut command: Command, lab: &Lab, further: &[&str]) -> Result<Self> {
        let node = lab.node.clone();
        command.env_clear().env("NO_COLOR", "1").args(flags(lab, further)?).args(further);
        let process = Process::start("the agent", &mut command, log_file(node.folder())?)?;
        Ok(Self { process, node })
    }

    /// Waits until `/ready` says so; returns how long that took.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        let node = self.node.clone();
        let ready = || admin(&node, "/ready").is_ok_and(|reply| reply.status == 200);
        self.process.wait("become ready", limit, |_| ready())
    }

    /// Waits until it serves and is ready. Until it listens, another agent may answer for it.
    ///
    /// # Panics
    ///
    /// When it ends, or is not ready in time.
    #[track_caller]
    pub fn serves(&mut self) {
        self.wait_said("Listening pods=", READY_LIMIT).expect("the agent listens");
        self.wait_ready(READY_LIMIT).expect("the agent is ready");
    }

    /// Asks the agent's own endpoint on the node's loopback.
    pub fn admin(&self, path: &str) -> Result<Reply> {
        admin(&self.node, path)
    }
}

impl Deref for Agent {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Agent {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn admin(node: &Node, path: &str) -> Result<Reply> {
    let stream = node.netns().enter(|| TcpStream::connect(SocketAddr::from(ADMIN)))?;
    let mut stream = stream.context("connecting to the agent's admin port")?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).context("setting a timeout")?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    exchange(&mut stream, &request).with_context(|| format!("asking for {path}"))
}

impl Lab {
    /// Starts the agent that cargo built with the flags of a plain installation and `further` ones, and does not wait.
    ///
    /// # Panics
    ///
    /// When it can't be run.
    #[track_caller]
    #[must_use]
    pub fn begin_agent(&self, further: &[&str]) -> Agent {
        let started = agent_binary().and_then(|binary| Agent::start(self, &binary, further));
        started.expect("the agent starts")
    }

    /// As [`Self::begin_agent`], and waits until it serves, alone or as the successor of another, and is ready.
    ///
    /// # Panics
    ///
    /// When it ends, or is not ready in time.
    #[track_caller]
    #[must_use]
    pub fn agent(&self, further: &[&str]) -> Agent {
        let mut agent = self.begin_agent(further);
        agent.serves();
        agent
    }

    /// `kiam-agent uninstall`, with what it printed.
    pub fn uninstall(&self) -> Result<String> {
        self.uninstall_with(&[])
    }

    /// As [`Self::uninstall`], with `further` flags.
    pub fn uninstall_with(&self, further: &[&str]) -> Result<String> {
        let mut command: Command = self.node.command(agent_binary()?)?;
        command.env_clear().arg("uninstall").arg("--bpffs").arg(self.pins());
        command.arg("--state-dir").arg(self.state()).args(further);
        let output = command.stdin(Stdio::null()).output().context("running uninstall")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("uninstall ended with {}; it said:\n{text}", output.status);
        }
        Ok(text)
    }

    /// `kiam-agent preflight` on the node with the flags that [`Self::begin_agent`] gives, less those named in `without`, and
    /// `further` ones. `prefix` is a command that runs it, such as `setpriv`.
    pub fn preflight(
        &self,
        prefix: &[&str],
        without: &[&str],
        further: &[&str],
    ) -> Result<Command> {
        let agent = agent_binary()?;
        let (program, arguments) = match prefix.split_first() {
            Some((program, arguments)) => (OsString::from(program), arguments),
            None => (agent.clone().into(), &[][..]),
        };
        let mut command = self.node.command(program)?;
        command.env_clear().stdin(Stdio::null()).args(arguments);
        if !prefix.is_empty() {
            command.arg(agent);
        }
        let mut all = flags(self, further)?;
        for name in without {
            if let Some(at) = all.iter().position(|flag| *flag == *format!("--{name}")) {
                all.drain(at..at + 2);
            }
        }
        command.arg("preflight").args(all).args(further);
        Ok(command)
    }

    /// The agent's state folder: what `--state-dir` names.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.node.folder().join("state")
    }

    /// The agent's folder on the node's bpffs: what `--bpffs` names.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        self.node.bpffs().join("kiam")
    }
}

/// `agent.log`, `agent-2.log`, …: one a run, as of two that run each is asked what it said.
fn log_file(folder: &Path) -> Result<PathBuf> {
    let name =
        |run: u32| if run == 1 { "agent.log".to_owned() } else { format!("agent-{run}.log") };
    for path in (1..).map(|run| folder.join(name(run))) {
        match File::create_new(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => {
                made.with_context(|| format!("making {}", path.display()))?;
                return Ok(path);
            }
        }
    }
    bail!("there is no name left for a log in {}", folder.display())
}

/// The flags of a plain installation, but for those that `further` has.
fn flags(lab: &Lab, further: &[&str]) -> Result<Vec<OsString>> {
    let (host, port) = ADMIN;
    let flags: [(&str, OsString); 14] = [
        ("host", NODE_V4.to_string().into()),
        ("port", AGENT_PORT.to_string().into()),
        ("admin", format!("{host}:{port}").into()),
        ("node-name", NODE_NAME.into()),
        ("kubeconfig", lab.kubeconfig()?.into()),
        ("cgroup", lab.node.kubepods().into()),
        ("bpffs", lab.pins().into()),
        ("state-dir", lab.state().into()),
        ("upstream", "http://169.254.169.254".into()),
        ("sts-endpoint", lab.sts.url().into()),
        ("region", REGION.into()),
        ("role-base-arn", role_base_arn().into()),
        ("level", "debug".into()),
        // Tests that end an agent mostly have no successor for it.
        ("grace-period", "0s".into()),
    ];
    let usual = without(flags, further);
    Ok(usual.flat_map(|(name, value)| [OsString::from(format!("--{name}")), value]).collect())
}

/// Those `flags`, by their names, that `further` does not have.
pub(crate) fn without<'a, T, const N: usize>(
    flags: [(&'a str, T); N],
    further: &'a [&str],
) -> impl Iterator<Item = (&'a str, T)> {
    let given = |name: &str| further.iter().any(|flag| flag.starts_with(&format!("--{name}=")));
    flags.into_iter().filter(move |(name, _)| !given(name))
}

//! The real agent's binary, running on the lab's node.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

use super::{
    fake::imds::REGION,
    node::{NODE_NAME, NODE_V4, Node},
    world::{Lab, role_base_arn},
};
use crate::{
    ask::agent_binary,
    pod_client::wire::{Reply, exchange},
};

/// The agent's own port; pods are redirected here.
pub const AGENT_PORT: u16 = 3100;
const ADMIN: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 3101);
const POLL: Duration = Duration::from_millis(10);
/// Nothing takes so long but a mistake, on a slow machine too.
pub const READY_LIMIT: Duration = Duration::from_secs(120);
/// How long a polite end may take.
const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// One run of the agent. Drop kills it; in a panicking test its output is printed first.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: PathBuf,
    node: Node,
    exited: Option<ExitStatus>,
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
        let (log, output) = log_file(node.folder())?;
        command
            .env_clear()
            .env("NO_COLOR", "1")
            .args(flags(lab, further)?)
            .args(further)
            .stdin(Stdio::null());
        command.stderr(output.try_clone().context("sharing the log")?).stdout(output);
        let child = command.spawn();
        let child = child.context("starting the agent")?;
        Ok(Self { child, log, node, exited: None })
    }

    /// Waits until `/ready` says so; returns how long that took.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        let started = Instant::now();
        loop {
            if self.admin("/ready").is_ok_and(|reply| reply.status == 200) {
                return Ok(started.elapsed());
            }
            if let Some(status) = self.status()? {
                bail!("the agent ended with {status}; it said:\n{}", self.log());
            }
            if started.elapsed() > limit {
                bail!("the agent is not ready after {limit:?}; it said:\n{}", self.log());
            }
            thread::sleep(POLL);
        }
    }

    /// Waits until its own log, of this run alone, says `text`.
    pub fn wait_said(&mut self, text: &str, limit: Duration) -> Result<()> {
        let started = Instant::now();
        while !self.said(text) {
            if let Some(status) = self.status()? {
                bail!("the agent ended with {status}; it said:\n{}", self.log());
            }
            if started.elapsed() > limit {
                bail!("the agent did not say {text:?} in {limit:?}, but:\n{}", self.log());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether its own log says `text`.
    #[must_use]
    pub fn said(&self, text: &str) -> bool {
        self.log().contains(text)
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
        let stream = self.node.netns().enter(|| TcpStream::connect(SocketAddr::from(ADMIN)))?;
        let mut stream = stream.context("connecting to the agent's admin port")?;
        stream.set_read_timeout(Some(Duration::from_secs(30))).context("setting a timeout")?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        exchange(&mut stream, &request).with_context(|| format!("asking for {path}"))
    }

    /// Everything it has written.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| format!("(no log: {error})"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The file that has its log.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(status) = self.status()? {
            bail!("the agent had ended already with {status}; it said:\n{}", self.log());
        }
        self.child.kill().context("killing the agent")?;
        let status = self.child.wait().context("waiting for the agent")?;
        self.exited = Some(status);
        if status.signal() != Some(Signal::KILL.as_raw()) {
            bail!("the agent ended with {status} before it was killed; it said:\n{}", self.log());
        }
        Ok(())
    }

    /// Asks it to end (SIGTERM) and returns how it did.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if self.status()?.is_none() {
            self.signal(Signal::TERM)?;
        }
        self.wait_end(EXIT_LIMIT)
    }

    /// Waits until it has ended by itself, and returns how it did.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if started.elapsed() > limit {
                bail!("the agent has not ended after {limit:?}; it said:\n{}", self.log());
            }
            thread::sleep(POLL);
        }
    }

    /// Makes it hang (SIGSTOP): its sockets stay open and nothing answers.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on (SIGCONT).
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("signalling the agent")
    }

    fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait().context("asking after the agent")?;
        }
        Ok(self.exited)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the agent's output\n{}---", self.log());
        }
        if self.exited.is_none() {
            let killed: io::Result<_> = self.child.kill().and_then(|()| self.child.wait());
            if let Err(error) = killed {
                eprintln!("lab: the agent can't be killed: {error}");
            }
        }
    }
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
fn log_file(folder: &Path) -> Result<(PathBuf, File)> {
    let name =
        |run: u32| if run == 1 { "agent.log".to_owned() } else { format!("agent-{run}.log") };
    for path in (1..).map(|run| folder.join(name(run))) {
        match File::options().create_new(true).append(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            opened => {
                let file = opened.with_context(|| format!("opening {}", path.display()))?;
                return Ok((path, file));
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
    let given = |name: &str| further.iter().any(|flag| flag.starts_with(&format!("--{name}=")));
    Ok(flags
        .into_iter()
        .filter(|(name, _)| !given(name))
        .flat_map(|(name, value)| [OsString::from(format!("--{name}")), value])
        .collect())
}

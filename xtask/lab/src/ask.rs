//! Asking the metadata service from inside a pod, by the client that is a hidden command of this project's own binary.

use std::{
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, bail};

use super::{cgroup::Cgroup, netns::Netns, node::Node, pod::LabPod, world::Lab};
use crate::pod_client::{self, Attempt, Tally};

impl LabPod {
    /// Asks from inside the pod; one attempt for each time that `options` ask. A refused
    /// connection is an attempt, not an error.
    pub fn ask(&self, options: &pod_client::Options) -> Result<Vec<Attempt>> {
        finish(self.asking(options)?)
    }

    /// Asks in the background until [`Meanwhile::finish`].
    pub fn ask_meanwhile(&self, options: &pod_client::Options) -> Result<Meanwhile> {
        let options = pod_client::Options { until_eof: true, ..options.clone() };
        let mut child = self.asking(&options)?;
        let enough = child.stdin.take();
        Ok(Meanwhile { enough, attempts: thread::spawn(move || finish(child)) })
    }

    /// Asks from `threads` threads until [`Asking::finish`], and from each as often as `options` say at least.
    pub fn ask_from(&self, threads: u32, options: &pod_client::Options) -> Result<Asking> {
        let options = pod_client::Options { threads: Some(threads), ..options.clone() };
        Ok(Asking(self.asking(&options)?))
    }

    /// Asks once as an SDK does: token, role, credentials.
    pub fn credentials(&self) -> Result<Attempt> {
        self.ask_once(&pod_client::Options::default())
    }

    /// Asks once for `path`, with a token.
    pub fn get(&self, path: &str) -> Result<Attempt> {
        self.ask_once(&pod_client::Options::get(path))
    }

    /// The first attempt of [`Self::ask`].
    pub fn ask_once(&self, options: &pod_client::Options) -> Result<Attempt> {
        self.ask(options)?.into_iter().next().context("the client in the pod said nothing")
    }

    /// Asks once from a cgroup that the pod's own root made below its container's.
    pub fn ask_in(&self, cgroup: &Cgroup, options: &pod_client::Options) -> Result<Attempt> {
        let mut command = self.netns().command(client_binary()?);
        cgroup.adopt(&mut command)?;
        ask_by(command, options)
    }

    /// Asks once from this pod's cgroup, in a network namespace that is not its own.
    pub fn ask_inside(&self, netns: &Netns, options: &pod_client::Options) -> Result<Attempt> {
        let mut command = netns.command(client_binary()?);
        self.cgroup().adopt(&mut command)?;
        ask_by(command, options)
    }

    fn asking(&self, options: &pod_client::Options) -> Result<Child> {
        start(self.command(client_binary()?)?, options)
    }
}

impl Node {
    /// Asks once from the host: in the node's namespace, outside the pods' cgroup.
    pub fn ask_once(&self, options: &pod_client::Options) -> Result<Attempt> {
        ask_by(self.command(client_binary()?)?, options)
    }

    /// Asks once from a process of the host that entered a pod's network namespace, as the runtime's
    /// `kubectl port-forward` does.
    pub fn ask_inside(&self, netns: &Netns, options: &pod_client::Options) -> Result<Attempt> {
        let mut command = self.command(client_binary()?)?;
        netns.clone().adopt(&mut command);
        ask_by(command, options)
    }
}

impl Lab {
    /// The ARN of the role that STS issued the attempt's credentials for; `None` when it got none of STS's.
    #[must_use]
    pub fn role_of(&self, attempt: &Attempt) -> Option<String> {
        self.sts.owner(&attempt.field("AccessKeyId")?).map(|issued| issued.role)
    }
}

/// A client that asks until it is told that it is enough.
#[derive(Debug)]
pub struct Meanwhile {
    enough: Option<ChildStdin>,
    attempts: JoinHandle<Result<Vec<Attempt>>>,
}

// === impl Meanwhile ===

impl Meanwhile {
    /// Lets it ask once more, and returns all attempts: the last has begun after this was called.
    pub fn finish(self) -> Result<Vec<Attempt>> {
        drop(self.enough);
        self.attempts.join().unwrap_or_else(|_| bail!("the client's thread panicked"))
    }
}

/// A client that asks from several threads until it is told that it is enough.
#[derive(Debug)]
pub struct Asking(Child);

// === impl Asking ===

impl Asking {
    /// Lets it end once each thread has asked as often as it was to, and returns the tally.
    pub fn finish(mut self) -> Result<Tally> {
        drop(self.0.stdin.take());
        let printed = output(self.0)?;
        serde_json::from_slice(&printed).context("reading a tally")
    }
}

/// The binary that has the `pod-client` command: this one, or the one beside the test that runs.
pub fn client_binary() -> Result<PathBuf> {
    built("lab")
}

/// The agent's: the one that `KIAM_AGENT` names, such as a release build that is to be measured, else the one beside the
/// test that runs.
pub fn agent_binary() -> Result<PathBuf> {
    std::env::var_os("KIAM_AGENT").map_or_else(|| built("kiam-agent"), |given| Ok(given.into()))
}

fn built(name: &str) -> Result<PathBuf> {
    let this = std::env::current_exe().context("asking for the running binary")?;
    let mut near = this.ancestors().skip(1).take(2).map(|dir| dir.join(name));
    near.find(|path| path.is_file())
        .with_context(|| format!("no {name} beside {}: cargo build --bins", this.display()))
}

fn start(mut command: Command, options: &pod_client::Options) -> Result<Child> {
    command.args(["pod-client", "ask"]).args(options.to_args());
    let goes_on = options.threads.is_some() || options.until_eof;
    command.stdin(if goes_on { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("starting the client of the lab")
}

/// Asks once by `command`, which ends in [`client_binary`].
pub fn ask_by(command: Command, options: &pod_client::Options) -> Result<Attempt> {
    let attempts = finish(start(command, options)?)?;
    attempts.into_iter().next().context("the client of the lab said nothing")
}

fn finish(child: Child) -> Result<Vec<Attempt>> {
    let printed = output(child)?;
    let lines = printed.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).context("reading an attempt")).collect()
}

fn output(child: Child) -> Result<Vec<u8>> {
    let output = child.wait_with_output().context("waiting for the client in a pod")?;
    if !output.status.success() {
        bail!("the client in a pod: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(output.stdout)
}

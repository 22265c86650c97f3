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
    /// Asks from inside the pod; one attempt for each time that `options` ask.
    ///
    /// # Errors
    ///
    /// Only when the client can't be run: a refused connection is an attempt.
    pub fn ask(&self, options: &pod_client::Options) -> Result<Vec<Attempt>> {
        finish(self.asking(options)?)
    }

    /// Asks in the background until [`Meanwhile::finish`].
    ///
    /// # Errors
    ///
    /// When the client can't be started.
    pub fn ask_meanwhile(&self, options: &pod_client::Options) -> Result<Meanwhile> {
        let options = pod_client::Options { until_eof: true, ..options.clone() };
        let mut child = self.asking(&options)?;
        let enough = child.stdin.take();
        Ok(Meanwhile { enough, attempts: thread::spawn(move || finish(child)) })
    }

    /// Asks from `threads` threads until [`Asking::finish`], and from each as often as `options` say at least.
    ///
    /// # Errors
    ///
    /// When the client can't be started.
    pub fn ask_from(&self, threads: u32, options: &pod_client::Options) -> Result<Asking> {
        let options = pod_client::Options { threads: Some(threads), ..options.clone() };
        Ok(Asking(self.asking(&options)?))
    }

    /// Asks once as an SDK does: token, role, credentials.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn credentials(&self) -> Result<Attempt> {
        self.ask_once(&pod_client::Options::default())
    }

    /// Asks once for `path`, with a token.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn get(&self, path: &str) -> Result<Attempt> {
        self.ask_once(&pod_client::Options::get(path))
    }

    /// The first attempt of [`Self::ask`].
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn ask_once(&self, options: &pod_client::Options) -> Result<Attempt> {
        self.ask(options)?.into_iter().next().context("the client in the pod said nothing")
    }

    /// Asks once from a cgroup that the pod's own root made below its container's.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn ask_in(&self, cgroup: &Cgroup, options: &pod_client::Options) -> Result<Attempt> {
        let mut command = self.netns().command(client_binary()?);
        cgroup.adopt(&mut command)?;
        once(command, options)
    }

    /// Asks once from this pod's cgroup, in a network namespace that is not its own.
    ///
    /// # Errors
    ///
    /// As [`Self::ask`].
    pub fn ask_inside(&self, netns: &Netns, options: &pod_client::Options) -> Result<Attempt> {
        let mut command = netns.command(client_binary()?);
        self.cgroup().adopt(&mut command)?;
        once(command, options)
    }

    /// Runs a Python script inside the pod and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it fails, with what it said.
    pub fn python(&self, script: &str) -> Result<String> {
        python(self.command("python3")?, script)
    }

    fn asking(&self, options: &pod_client::Options) -> Result<Child> {
        start(self.command(client_binary()?)?, options)
    }
}

impl Node {
    /// Asks once from the host: in the node's namespace, outside the pods' cgroup.
    ///
    /// # Errors
    ///
    /// As [`LabPod::ask`].
    pub fn ask_once(&self, options: &pod_client::Options) -> Result<Attempt> {
        once(self.command(client_binary()?)?, options)
    }

    /// Asks once from a process of the host that entered a pod's network namespace, as the runtime's
    /// `kubectl port-forward` does.
    ///
    /// # Errors
    ///
    /// As [`LabPod::ask`].
    pub fn ask_inside(&self, netns: &Netns, options: &pod_client::Options) -> Result<Attempt> {
        let mut command = self.command(client_binary()?)?;
        netns.clone().adopt(&mut command);
        once(command, options)
    }

    /// Runs a Python script on the host and returns what it printed.
    ///
    /// # Errors
    ///
    /// When it fails, with what it said.
    pub fn python(&self, script: &str) -> Result<String> {
        python(self.command("python3")?, script)
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
    ///
    /// # Errors
    ///
    /// When the client failed.
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
    ///
    /// # Errors
    ///
    /// When the client failed.
    pub fn finish(mut self) -> Result<Tally> {
        drop(self.0.stdin.take());
        let printed = output(self.0)?;
        serde_json::from_slice(&printed).context("reading a tally")
    }
}

/// The binary that has the `in-pod` command: this one, or the one beside the test that runs.
///
/// # Errors
///
/// When it is not built.
pub fn client_binary() -> Result<PathBuf> {
    let this = std::env::current_exe().context("asking for the running binary")?;
    let mut near = this.ancestors().skip(1).take(2).map(|dir| dir.join("lab"));
    near.find(|path| path.is_file())
        .with_context(|| format!("no lab binary beside {}: cargo build -p lab", this.display()))
}

fn python(mut python: Command, script: &str) -> Result<String> {
    let output = python.args(["-c", script]).stdin(Stdio::null()).output();
    let output = output.context("running python3")?;
    if !output.status.success() {
        bail!("python3: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn start(mut command: Command, options: &pod_client::Options) -> Result<Child> {
    command.arg("in-pod").args(options.to_args());
    let goes_on = options.threads.is_some() || options.until_eof;
    command.stdin(if goes_on { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().context("starting the client of the lab")
}

fn once(command: Command, options: &pod_client::Options) -> Result<Attempt> {
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

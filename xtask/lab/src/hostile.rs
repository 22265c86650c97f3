//! Processes of pods that go on until they are ended: an honest one that is served, and hostile ones beside it.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde::{Serialize, de::DeserializeOwned};

use super::{ask::client_binary, pod::LabPod};
use crate::pod_client::{
    hostile::{Program, Report},
    victim::{Pace, VictimReport},
};

/// An honest process that asks all the while. Drop kills it.
#[derive(Debug)]
pub struct Victim(Process);

/// A hostile process in full swing. Drop kills it.
#[derive(Debug)]
pub struct Neighbour(Process);

#[derive(Debug)]
struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

// === impl Victim ===

impl Victim {
    /// Lets it end, and returns what came of its requests.
    pub fn finish(self) -> Result<VictimReport> {
        self.0.finish()
    }
}

// === impl Neighbour ===

impl Neighbour {
    /// Whether it goes on.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        matches!(self.0.child.try_wait(), Ok(None))
    }

    /// Ends it, and returns what it did.
    pub fn finish(self) -> Result<Report> {
        self.0.finish()
    }
}

impl LabPod {
    /// Begins to ask as an SDK does, until [`Victim::finish`].
    pub fn victim(&self, pace: &Pace) -> Result<Victim> {
        Process::start(self.command(client_binary()?)?, "victim", pace).map(Victim)
    }

    /// Starts a hostile program, and waits until it is in full swing. It has the lowest priority of the node's processes, so
    /// that what its victims feel is what the agent does for it, and not its own use of the processors.
    pub fn hostile(&self, program: &Program) -> Result<Neighbour> {
        let mut command = self.command("nice")?;
        command.arg("-n19").arg(client_binary()?);
        let mut process = Process::start(command, "hostile", program)?;
        let mut line = String::new();
        process.stdout.read_line(&mut line).context("waiting for a hostile program")?;
        if line.trim() != "in full swing" {
            bail!("{program:?} said {line:?}, and ended with {}", process.child.wait()?);
        }
        Ok(Neighbour(process))
    }
}

// === impl Process ===

impl Process {
    fn start(mut command: Command, name: &str, order: &impl Serialize) -> Result<Self> {
        let order = serde_json::to_string(order).context("an order")?;
        command.args(["pod-client", name]).arg(order).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let stdout = child.stdout.take().context("its stdout is piped")?;
        Ok(Self { child, stdout: BufReader::new(stdout) })
    }

    fn finish<T: DeserializeOwned>(mut self) -> Result<T> {
        drop(self.child.stdin.take());
        let mut line = String::new();
        self.stdout.read_line(&mut line).context("reading what came of it")?;
        let status = self.child.wait().context("waiting for its end")?;
        if !status.success() {
            bail!("it ended with {status}");
        }
        serde_json::from_str(&line).with_context(|| format!("not what came of it: {line:?}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, but where a test fails.
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

//! A hostile process in a pod or on the host, which does what it is told, step by step.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};

use super::{ask::client_binary, cgroup::Cgroup, node::Node, pod::LabPod};
use crate::pod_client::{
    Attempt,
    attack::{Attack, Order},
};

/// The process. Drop kills it, and with it all that it holds.
#[derive(Debug)]
pub struct Attacker {
    child: Child,
    orders: ChildStdin,
    attempts: BufReader<ChildStdout>,
}

// === impl Attacker ===

impl Attacker {
    /// Tries one thing; each step of it takes at most `timeout_ms`. An attempt that fails is an
    /// answer, not an error.
    pub fn attempt(&mut self, attack: Attack, timeout_ms: u64) -> Result<Attempt> {
        let order = serde_json::to_string(&Order { attack, timeout_ms }).context("an order")?;
        writeln!(self.orders, "{order}").context("ordering an attempt")?;
        let mut line = String::new();
        self.attempts.read_line(&mut line).context("reading what came of an attempt")?;
        serde_json::from_str(&line).with_context(|| format!("after {order} came {line:?}"))
    }

    /// Does one thing that must succeed for what follows to mean anything.
    pub fn must(&mut self, attack: Attack) -> Result<()> {
        let what = format!("{attack:?}");
        match self.attempt(attack, 5000)?.error {
            Some(error) => bail!("{what}: {error}"),
            None => Ok(()),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts one by `command`, which ends in [`client_binary`].
    pub fn start_by(mut command: Command) -> Result<Self> {
        command.args(["pod-client", "attack"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting an attacker")?;
        let orders = child.stdin.take().context("an attacker's stdin is piped")?;
        let attempts = child.stdout.take().context("an attacker's stdout is piped")?;
        Ok(Self { child, orders, attempts: BufReader::new(attempts) })
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        let killed = self.child.kill().and_then(|()| self.child.wait());
        if let Err(error) = killed {
            eprintln!("lab: an attacker can't be killed: {error}");
        }
    }
}

impl LabPod {
    /// A hostile process in the pod.
    pub fn attacker(&self) -> Result<Attacker> {
        Attacker::start_by(self.command(client_binary()?)?)
    }

    /// One in the pod's network, but in `cgroup`.
    pub fn attacker_in(&self, cgroup: &Cgroup) -> Result<Attacker> {
        let mut command = self.netns().command(client_binary()?);
        cgroup.adopt(&mut command)?;
        Attacker::start_by(command)
    }
}

impl Node {
    /// One on the host, outside the pods' cgroup.
    pub fn attacker(&self) -> Result<Attacker> {
        Attacker::start_by(self.command(client_binary()?)?)
    }
}

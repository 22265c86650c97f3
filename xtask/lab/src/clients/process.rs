//! Processes of the test: none outlives it, none is waited for without end.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::Netns;
use tokio::time::Instant;

const STEP: Duration = Duration::from_millis(50);

/// A server that runs until it is dropped, and what it wrote.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

// === impl Process ===

impl Process {
    /// Starts it; what it prints goes into a file of its name in `folder`.
    pub(super) fn start(name: &'static str, command: &mut Command, folder: &Path) -> Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let out = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let err = out.try_clone().context("sharing the log")?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { name, child, log })
    }

    /// Waits until `path` at `address` is answered with 200, asking from inside `netns`.
    pub(super) fn wait_until_it_answers(
        &mut self,
        netns: &Netns,
        address: SocketAddr,
        path: &str,
    ) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().context("asking for its status")? {
                bail!("{} ended: {status}\n{}", self.name, self.log());
            }
            if netns.enter(|| status(address, path))?.is_some_and(|status| status == 200) {
                return Ok(());
            }
            thread::sleep(STEP);
        }
        bail!("{} did not answer {path} with 200 within a minute\n{}", self.name, self.log());
    }

    /// The end of what it wrote.
    pub(super) fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn status(address: SocketAddr, path: &str) -> Option<u16> {
    let timeout = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&address, timeout).ok()?;
    stream.set_read_timeout(Some(timeout)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut start = [0; 12];
    stream.read_exact(&mut start).ok()?;
    std::str::from_utf8(&start).ok()?.strip_prefix("HTTP/1.1 ")?.parse().ok()
}

/// How a client ended, and what it printed.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// A client that has been started.
#[derive(Debug)]
pub(super) struct Client(Child);

// === impl Client ===

impl Client {
    /// Starts it. It is expected to print less than a pipe holds.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Self(command.spawn().context("starting a client")?))
    }

    /// Waits for its end, at most a minute.
    pub(super) fn finish(mut self) -> Result<Ended> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            match self.0.try_wait().context("asking for its status")? {
                Some(status) => break status,
                None if Instant::now() > deadline => bail!("a client did not end within a minute"),
                None => thread::sleep(STEP),
            }
        };
        let (mut stdout, mut stderr) = (String::new(), String::new());
        if let (Some(out), Some(err)) = (&mut self.0.stdout, &mut self.0.stderr) {
            out.read_to_string(&mut stdout).context("reading what a client printed")?;
            err.read_to_string(&mut stderr).context("reading what a client printed")?;
        }
        Ok(Ended { status, stdout, stderr })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

//! The real agent's binary on loopback, without the kernel's part: pods are records and addresses of 127.0.0.0/8.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use super::fake::imds::REGION;

/// How long an answer may take, and the start.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// The agent of the node `n1`, which goes by the addresses that pods ask from. Drop kills it; in a panicking test its log
/// is printed first.
#[derive(Debug)]
pub struct LoopbackAgent {
    child: Child,
    pods: SocketAddr,
    admin: SocketAddr,
    folder: TempDir,
}

// === impl LoopbackAgent ===

impl LoopbackAgent {
    /// Starts `binary` with the kubeconfig that `folder` has, the STS at `sts`, and `further` flags, which replace those that
    /// are usual here. It signs with the access key `signer`, or has none. Returns when it listens.
    ///
    /// # Errors
    ///
    /// When it can't be run, or ends, or does not listen within 20 s; with what it logged.
    pub fn start(
        binary: &Path,
        folder: TempDir,
        sts: &str,
        signer: Option<&str>,
        further: &[&str],
    ) -> Result<Self> {
        let keys =
            signer.map(|key| [("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", "secret")]);
        Self::start_in(binary, folder, sts, keys.as_ref().map_or(&[], |keys| keys), further)
    }

    /// As [`LoopbackAgent::start`], with this `environment` and no other.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn start_in(
        binary: &Path,
        folder: TempDir,
        sts: &str,
        environment: &[(&str, &str)],
        further: &[&str],
    ) -> Result<Self> {
        let log = folder.path().join("log");
        let output = File::create(&log).context("making the log")?;
        let mut child = Command::new(binary)
            .args(flags(folder.path(), sts, further))
            .args(further)
            .env_clear()
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .context("starting the agent")?;
        let begun = Instant::now();
        loop {
            let said = fs::read_to_string(&log).context("reading the log")?;
            if let Some((pods, admin)) = bound(&said) {
                return Ok(Self { child, pods, admin, folder });
            }
            let ended = child.try_wait().context("asking after the agent")?;
            if ended.is_some() || begun.elapsed() > LIMIT {
                // Ended already is as good.
                let _ = child.kill();
                let _ = child.wait();
                bail!("the agent does not listen ({ended:?}); it said:\n{said}");
            }
            thread::sleep(POLL);
        }
    }

    /// Where it listens for pods.
    #[must_use]
    pub fn pods(&self) -> SocketAddr {
        self.pods
    }

    /// Where it listens for operators.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// What it works in: `kubeconfig`, `log`, and `state`, which `--state-dir` names.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Everything it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        let path: PathBuf = self.folder.path().join("log");
        fs::read_to_string(path).unwrap_or_else(|error| format!("(no log: {error})"))
    }

    /// The most memory that it has had at once, in bytes (`VmHWM`).
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .context("reading the agent's status")?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.trim().strip_suffix(" kB"));
        let kib: u64 = kib.context("the agent has no memory")?.parse().context("VmHWM")?;
        Ok(kib * 1024)
    }

    /// How long processors have worked for it.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .context("reading the agent's stat")?;
        /// `USER_HZ`, in which the kernel counts for programs, whatever its own clock is.
        const TICKS_PER_SECOND: u32 = 100;
        let (_, after_name) = stat.rsplit_once(") ").context("the agent's stat has no name")?;
        let ticks = after_name.split(" ").skip(11).take(2).map(str::parse::<u64>);
        let ticks: u64 = ticks.sum::<Result<_, _>>().context("the agent's stat has no times")?;
        Ok(Duration::from_secs(ticks) / TICKS_PER_SECOND)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("signalling the agent")
    }

    /// Asks it to end (SIGTERM) and returns how it did.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.child.wait().context("waiting for the agent")
    }
}

impl Drop for LoopbackAgent {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the agent's output\n{}---", self.log());
        }
        // Ended already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends `request` to `address` as it is, and returns all that comes back until the end.
///
/// # Errors
///
/// When nobody is there, or takes it.
pub fn ask(address: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address).context("connecting")?;
    stream.set_read_timeout(Some(LIMIT)).context("setting a timeout")?;
    stream.write_all(request).context("sending the request")?;
    let mut answer = Vec::new();
    // A reset after the answer is an end too.
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Asks `address` for `path` as a pod does.
///
/// # Errors
///
/// As [`ask`].
pub fn get(address: SocketAddr, path: &str) -> Result<String> {
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n");
    ask(address, request.as_bytes())
}

/// Status and body of an answer.
///
/// # Errors
///
/// When it is none.
pub fn parts(answer: &str) -> Result<(u16, &str)> {
    let (head, body) =
        answer.split_once("\r\n\r\n").context("the answer has no end of its head")?;
    let status = head.split(' ').nth(1).context("the answer has no status")?;
    Ok((status.parse().with_context(|| format!("{status:?} is no status"))?, body))
}

/// The usual flags, but for those that `further` has.
fn flags(folder: &Path, sts: &str, further: &[&str]) -> Vec<OsString> {
    let within = |name: &str| folder.join(name).display().to_string();
    let flags = [
        ("interceptor", "off".to_owned()),
        ("host", "127.0.0.1".to_owned()),
        ("port", "0".to_owned()),
        ("admin", "127.0.0.1:0".to_owned()),
        ("node-name", "n1".to_owned()),
        ("region", REGION.to_owned()),
        ("upstream", "http://127.0.0.1:9".to_owned()),
        ("sts-endpoint", sts.to_owned()),
        ("kubeconfig", within("kubeconfig")),
        ("state-dir", within("state")),
        // Tests that end an agent mostly have no successor for it.
        ("grace-period", "0s".to_owned()),
    ];
    let given = |name: &str| further.iter().any(|flag| flag.starts_with(&format!("--{name}=")));
    let usual = flags.into_iter().filter(|(name, _)| !given(name));
    let usual = usual.map(|(name, value)| OsString::from(format!("--{name}={value}")));
    usual.chain(["--json-log".into()]).collect()
}

/// Where the agent listens, once its log says so.
fn bound(log: &str) -> Option<(SocketAddr, SocketAddr)> {
    log.lines().find_map(|line| {
        let event: Value = serde_json::from_str(line).ok()?;
        let pods = event["pods"].as_str()?.trim_matches(['[', ']']).parse().ok()?;
        Some((pods, event["admin"].as_str()?.parse().ok()?))
    })
}

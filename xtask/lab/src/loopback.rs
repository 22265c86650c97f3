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

use super::{
    fake::{
        Place,
        imds::{NODE_ACCESS_KEY, REGION},
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord},
        sts::Sts,
    },
    pod_client::{
        Attempt, Options, attempt,
        wire::{Reply, exchange},
    },
    role_arn, role_base_arn,
};

/// How long an answer may take, and the start.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);
/// The agent's `--node-name`.
pub const NODE_NAME: &str = "n1";

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
    pub fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .context("reading the agent's status")?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.trim().strip_suffix(" kB"));
        let kib: u64 = kib.context("the agent has no memory")?.parse().context("VmHWM")?;
        Ok(kib * 1024)
    }

    /// How long processors have worked for it.
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
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("signalling the agent")
    }

    /// Asks it to end (SIGTERM) and returns how it did.
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

/// An agent on loopback, and what it depends on.
#[derive(Debug)]
pub struct LoopbackNode {
    /// The agent.
    pub agent: LoopbackAgent,
    /// The API server.
    pub kubernetes: Kubernetes,
    /// AWS STS, which knows the node's own access key.
    pub sts: Sts,
}

// === impl LoopbackNode ===

impl LoopbackNode {
    /// Starts all three, the agent last, once `prepare` has seen to the others.
    pub fn start(
        binary: &Path,
        flags: &[&str],
        prepare: impl FnOnce(&Kubernetes, &Sts),
    ) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder")?;
        let kubernetes = Kubernetes::start(Place::loopback())?;
        kubernetes.write_kubeconfig(&folder.path().join("kubeconfig"))?;
        let sts = Sts::start(Place::loopback(), NODE_ACCESS_KEY)?;
        prepare(&kubernetes, &sts);
        let base = format!("--role-base-arn={}", role_base_arn());
        let flags = [&[base.as_str()], flags].concat();
        let signer = Some(NODE_ACCESS_KEY);
        let agent = LoopbackAgent::start(binary, folder, &sts.url(), signer, &flags)?;
        Ok(Self { agent, kubernetes, sts })
    }

    /// Asks from the first address of `pod`.
    #[must_use]
    pub fn ask(&self, pod: &PodRecord, options: &Options) -> Attempt {
        let agent = self.agent.pods();
        let (to, bind) = (Some(agent.ip()), pod.ips.first().copied());
        attempt(&Options { to, port: agent.port(), bind, ..options.clone() })
    }

    /// Asks as the pod's SDK does: token, role, credentials.
    #[must_use]
    pub fn credentials(&self, pod: &PodRecord) -> Attempt {
        self.ask(pod, &Options::default())
    }

    /// The ARN of the role that STS issued the attempt's credentials for.
    #[must_use]
    pub fn role_of(&self, attempt: &Attempt) -> Option<String> {
        self.sts.owner(&attempt.field("AccessKeyId")?).map(|issued| issued.role)
    }

    /// Whether `pod` gets the credentials of the role that it is annotated with.
    #[must_use]
    pub fn serves(&self, pod: &PodRecord) -> bool {
        let role = pod.annotated_role().map(role_arn);
        role.is_some() && self.role_of(&self.credentials(pod)) == role
    }

    /// Asserts that [`Self::serves`].
    ///
    /// # Panics
    ///
    /// When it does not.
    #[track_caller]
    pub fn assert_served(&self, pod: &PodRecord) {
        assert!(self.serves(pod), "{pod:?}: {:?}", self.credentials(pod));
    }

    /// The status of one of the operators' pages.
    ///
    /// # Panics
    ///
    /// When the agent does not answer.
    #[must_use]
    pub fn status(&self, path: &str) -> u16 {
        get(self.agent.admin(), path).expect("the agent answers its operators").status
    }

    /// The agent's metrics.
    ///
    /// # Panics
    ///
    /// When the agent does not answer.
    #[must_use]
    pub fn metrics(&self) -> String {
        get(self.agent.admin(), "/metrics").expect("the agent answers its operators").body
    }
}

/// Pod `number` of the namespace `shop`, running on the loopback agent's node at an address of its own.
#[must_use]
pub fn pod(number: u16) -> PodRecord {
    let [high, low] = number.to_be_bytes();
    let uid = format!("{number:08x}-0000-4000-8000-000000000000");
    PodRecord::scheduled("shop", &format!("pod-{number}"), &uid, NODE_NAME)
        .running(&[[127, 77, high, low].into()])
}

/// Tells the API of `pod`, and of its namespace if that is missing.
pub fn schedule(kubernetes: &Kubernetes, pod: &PodRecord) {
    kubernetes.ensure_namespace(&NamespaceRecord::new(&pod.namespace));
    kubernetes.apply_pod(pod);
}

/// Sends `request` to `address` as it is, and returns all that comes back until the end.
pub fn ask(address: SocketAddr, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address).context("connecting")?;
    stream.set_read_timeout(Some(LIMIT)).context("setting a timeout")?;
    stream.write_all(request).context("sending the request")?;
    let mut answer = Vec::new();
    // A reset after the answer is an end too.
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Asks `address` for `path` as a pod does, without a token.
pub fn get(address: SocketAddr, path: &str) -> Result<Reply> {
    let mut stream = TcpStream::connect(address).context("connecting")?;
    stream.set_read_timeout(Some(LIMIT)).context("setting a timeout")?;
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n");
    exchange(&mut stream, &request).with_context(|| format!("asking for {path}"))
}

/// The usual flags, but for those that `further` has.
fn flags(folder: &Path, sts: &str, further: &[&str]) -> Vec<OsString> {
    let within = |name: &str| folder.join(name).display().to_string();
    let flags = [
        ("interceptor", "off".to_owned()),
        ("host", "127.0.0.1".to_owned()),
        ("port", "0".to_owned()),
        ("admin", "127.0.0.1:0".to_owned()),
        ("node-name", NODE_NAME.to_owned()),
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

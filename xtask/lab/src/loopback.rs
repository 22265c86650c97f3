//! The real agent's binary on loopback, without the kernel's part: pods are records and addresses of 127.0.0.0/8.

use std::{
    ffi::OsString,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    ops::{Deref, DerefMut},
    path::Path,
    process::Command,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use super::{
    agent::without,
    ask::agent_binary,
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
    process::Process,
    role_arn, role_base_arn,
};

/// How long an answer may take, and the start.
const LIMIT: Duration = Duration::from_secs(60);
/// How long credentials are waited for that STS may never issue.
const FIRST_CREDENTIALS: Duration = Duration::from_secs(10);
/// The agent's `--node-name`.
pub const NODE_NAME: &str = "n1";

/// The agent of the node `n1`, which goes by the addresses that pods ask from.
#[derive(Debug)]
pub struct LoopbackAgent {
    process: Process,
    pods: SocketAddr,
    admin: SocketAddr,
    folder: TempDir,
}

// === impl LoopbackAgent ===

impl LoopbackAgent {
    /// Starts the agent that cargo built with the kubeconfig that `folder` has, the STS at `sts`, and `further` flags, which
    /// replace those that are usual here. It signs with the access key `signer`, or has none. Returns when it listens,
    /// and STS has answered for the pods.
    pub fn start(
        folder: TempDir,
        sts: &str,
        signer: Option<&str>,
        further: &[&str],
    ) -> Result<Self> {
        let keys =
            signer.map(|key| [("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", "secret")]);
        let keys = keys.as_ref().map_or(&[][..], |keys| keys);
        Self::start_in(&agent_binary()?, folder, sts, keys, further)
    }

    /// As [`LoopbackAgent::start`], with this `binary`, and this `environment` and no other.
    pub fn start_in(
        binary: &Path,
        folder: TempDir,
        sts: &str,
        environment: &[(&str, &str)],
        further: &[&str],
    ) -> Result<Self> {
        let mut process = Self::begin(binary, folder.path(), sts, environment, further)?;
        process.wait("listened", LIMIT, |process| bound(&process.log()).is_some())?;
        let (pods, admin) = bound(&process.log()).context("the agent listened before")?;
        let agent = Self { process, pods, admin, folder };
        agent.wait_for_credentials();
        Ok(agent)
    }

    /// Waits until STS has answered for each pod, as far as it does so soon. Whoever asks before waits for their own.
    fn wait_for_credentials(&self) {
        let begun = Instant::now();
        let waits = |ready: Reply| ready.body.contains("first credentials");
        while get(self.admin, "/ready").is_ok_and(waits) && begun.elapsed() < FIRST_CREDENTIALS {
            sleep(Duration::from_millis(10));
        }
    }

    /// Starts the agent as [`LoopbackAgent::start_in`] does, and waits for nothing.
    pub fn begin(
        binary: &Path,
        folder: &Path,
        sts: &str,
        environment: &[(&str, &str)],
        further: &[&str],
    ) -> Result<Process> {
        let mut command = Command::new(binary);
        command.args(flags(folder, sts, further)).args(further);
        command.env_clear().envs(environment.iter().copied());
        Process::start("the agent", &mut command, folder.join("log"))
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
}

impl Deref for LoopbackAgent {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for LoopbackAgent {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
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
    pub fn start(flags: &[&str], prepare: impl FnOnce(&Kubernetes, &Sts)) -> Result<Self> {
        Self::start_by(&agent_binary()?, flags, prepare)
    }

    /// As [`LoopbackNode::start`], with this agent's `binary`.
    pub fn start_by(
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
        let signer = [("AWS_ACCESS_KEY_ID", NODE_ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", "secret")];
        let agent = LoopbackAgent::start_in(binary, folder, &sts.url(), &signer, &flags)?;
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
    let usual = without(flags, further);
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

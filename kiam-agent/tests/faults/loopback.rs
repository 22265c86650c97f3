//! The agent's own program on loopback, with pods that are records and addresses of 127.0.0.0/8.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use tempfile::TempDir;
use tokio::time::Instant;
use xtask::{
    lab::{
        fake::{
            Place,
            kubernetes::{Kubernetes, NamespaceRecord, PodRecord},
            sts::Sts,
        },
        role_arn, role_base_arn,
    },
    pod_client::{Attempt, Options, attempt, wire},
};

use super::{AGENT, PATIENCE};

const NODE_KEY: &str = "AKIANODE";

/// The agent and its neighbours.
pub(super) struct Node {
    agent: Child,
    pods: SocketAddr,
    admin: SocketAddr,
    pub(super) kubernetes: Kubernetes,
    pub(super) sts: Sts,
    _folder: TempDir,
}

/// A pod's record, and from where it asks.
#[derive(Clone, Debug)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) role: String,
    number: u16,
}

// === impl Node ===

impl Node {
    /// Starts the agent when its neighbours are as `prepare` makes them; returns when it listens.
    pub(super) fn start(flags: &[&str], prepare: impl FnOnce(&Kubernetes, &Sts)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kubernetes = Kubernetes::start(Place::loopback()).unwrap();
        let sts = Sts::start(Place::loopback(), NODE_KEY).unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        kubernetes.write_kubeconfig(&kubeconfig).unwrap();
        prepare(&kubernetes, &sts);
        let log = folder.path().join("log");
        let agent = Command::new(AGENT)
            .args(["--interceptor=off", "--host=127.0.0.1", "--port=0", "--admin=127.0.0.1:0"])
            .args(["--node-name=n1", "--region=eu-west-1", "--json-log"])
            .args(flags)
            .arg("--upstream=http://127.0.0.1:9")
            .arg(format!("--role-base-arn={}", role_base_arn()))
            .arg(format!("--sts-endpoint={}", sts.url()))
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .arg(format!("--state-dir={}", folder.path().join("state").display()))
            .env_clear()
            .envs([("AWS_ACCESS_KEY_ID", NODE_KEY), ("AWS_SECRET_ACCESS_KEY", "secret")])
            .stderr(fs::File::create(&log).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let (pods, admin) = loop {
            let text = fs::read_to_string(&log).unwrap();
            if let Some(bound) = bound(&text) {
                break bound;
            }
            assert!(begun.elapsed() < PATIENCE, "the agent does not listen; it said:\n{text}");
            thread::sleep(Duration::from_millis(10));
        };
        Self { agent, pods, admin, kubernetes, sts, _folder: folder }
    }

    /// Asks as the pod's SDK does: token, role, credentials.
    pub(super) fn ask(&self, pod: &Pod) -> Attempt {
        let to = Some(self.pods.ip());
        let bind = Some(pod.address());
        attempt(&Options { to, port: self.pods.port(), bind, ..Options::default() })
    }

    /// Asks, and must get the credentials of the pod's own role.
    #[track_caller]
    pub(super) fn assert_served(&self, pod: &Pod) {
        let attempt = self.ask(pod);
        assert_eq!(self.role_of(&attempt), Some(role_arn(&pod.role)), "{pod:?}: {attempt:?}");
    }

    /// Whose credentials an answer has.
    pub(super) fn role_of(&self, attempt: &Attempt) -> Option<String> {
        Some(self.sts.owner(&attempt.field("AccessKeyId")?)?.role)
    }

    /// The status of one of the operators' pages.
    pub(super) fn admin(&self, path: &str) -> u16 {
        let mut stream = TcpStream::connect(self.admin).unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        wire::exchange(&mut stream, &request).unwrap().status
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

// === impl Pod ===

impl Pod {
    /// The pod of this number, in the namespace `shop`.
    pub(super) fn new(number: u16, role: &str) -> Self {
        Self { namespace: "shop".to_owned(), role: role.to_owned(), number }
    }

    /// As the API has it.
    pub(super) fn record(&self) -> PodRecord {
        let number = self.number;
        let uid = format!("{number:08x}-0000-4000-8000-000000000000");
        PodRecord::scheduled(&self.namespace, &format!("pod-{number}"), &uid, "n1")
            .annotation("iam.amazonaws.com/role", &self.role)
            .running(&[self.address()])
    }

    /// Tells the API of it and of its namespace.
    pub(super) fn schedule(&self, kubernetes: &Kubernetes) {
        kubernetes.ensure_namespace(&NamespaceRecord::new(&self.namespace));
        kubernetes.apply_pod(&self.record());
    }

    fn address(&self) -> IpAddr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(127, 77, high, low).into()
    }
}

/// Where the agent listens, if it says so in its log.
fn bound(log: &str) -> Option<(SocketAddr, SocketAddr)> {
    log.lines().find_map(|line| {
        let event: serde_json::Value = serde_json::from_str(line).ok()?;
        let pods = event["pods"].as_str()?.trim_matches(['[', ']']).parse().ok()?;
        Some((pods, event["admin"].as_str()?.parse().ok()?))
    })
}

/// Why an attempt was refused.
pub(super) fn reason(attempt: &Attempt) -> &str {
    attempt.headers.get("x-kiam-reason").map(String::as_str).unwrap_or_default()
}

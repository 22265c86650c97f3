//! The real agent on loopback with source-IP identity, and what pods and operators ask of it.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::lab::fake::{
    Place,
    sts::{Issued, Sts},
};

use super::{PATIENCE, server::Server};

const NODE_KEY: &str = "AKIANODE";
pub(super) const BASE: &str = "arn:aws:iam::123456789012:role/";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// The agent of the node `n1`, which ends with this value.
pub(super) struct Agent {
    child: Child,
    pods: SocketAddr,
    admin: SocketAddr,
    log: Arc<Mutex<String>>,
    pub(super) sts: Sts,
    folder: TempDir,
}

// === impl Agent ===

impl Agent {
    /// Starts it with a token of its service account in a file, as in a pod.
    pub(super) fn start(server: &Server, token: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (file, kubeconfig) = (folder.path().join("token"), folder.path().join("kubeconfig"));
        fs::write(&file, token).unwrap();
        let text = server.kubeconfig(&json!({"tokenFile": file})).to_string();
        fs::write(&kubeconfig, text).unwrap();
        let sts = Sts::start(Place::loopback(), NODE_KEY).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_kiam-agent"))
            .args(["--interceptor=off", "--host=127.0.0.1", "--port=0", "--admin=127.0.0.1:0"])
            .args(["--node-name=n1", "--namespace-policy=required", "--region=eu-west-1"])
            .args(["--json-log", "--upstream=http://127.0.0.1:9"])
            .args(flags)
            .arg(format!("--role-base-arn={BASE}"))
            .arg(format!("--sts-endpoint={}", sts.url()))
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .arg(format!("--state-dir={}", folder.path().join("state").display()))
            .env_clear()
            .envs([("AWS_ACCESS_KEY_ID", NODE_KEY), ("AWS_SECRET_ACCESS_KEY", "secret")])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log: Arc<Mutex<String>> = Arc::default();
        let kept = Arc::clone(&log);
        let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut lines = lines.inspect(move |line| *kept.lock().unwrap() += &format!("{line}\n"));
        let (pods, admin) = lines
            .by_ref()
            .find_map(|line| {
                let event: Value = serde_json::from_str(&line).unwrap();
                let pods = event["pods"].as_str()?.trim_matches(['[', ']']).parse().ok()?;
                Some((pods, event["admin"].as_str()?.parse().unwrap()))
            })
            .expect("the agent logs where it listens");
        // Read on, so that the agent never waits for the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, pods, admin, log, sts, folder }
    }

    /// What a pod at the agent's own address is told about its role.
    pub(super) fn role(&self) -> (u16, String) {
        get(self.pods, ROLES)
    }

    /// Why the pod is told no role, and with which status.
    pub(super) fn refusal(&self) -> Option<(u16, String)> {
        let (head, _) = exchange(self.pods, ROLES);
        let reason = head.lines().find_map(|line| line.strip_prefix("x-kiam-reason: "))?;
        Some((status(&head), reason.to_owned()))
    }

    /// Whether the pod gets credentials of `role`, which STS made for the node.
    pub(super) fn gives(&self, role: &str) -> bool {
        self.issued(role).is_some_and(|issued| issued.caller == NODE_KEY)
    }

    /// What STS made the pod's credentials of `role` for; `None` where it gets none.
    pub(super) fn issued(&self, role: &str) -> Option<Issued> {
        let (status, body) = get(self.pods, &format!("{ROLES}{role}"));
        let body: Value = serde_json::from_str(&body).ok().filter(|_| status == 200)?;
        let issued = self.sts.owner(body["AccessKeyId"].as_str().unwrap()).unwrap();
        (issued.role == format!("{BASE}{role}")).then_some(issued)
    }

    pub(super) fn is_ready(&self) -> bool {
        get(self.admin, "/ready").0 == 200
    }

    /// A counter or gauge, by its name with labels; 0 where nothing was counted yet.
    pub(super) fn metric(&self, name: &str) -> f64 {
        let (_, text) = get(self.admin, "/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Whether its log has `text`.
    pub(super) fn said(&self, text: &str) -> bool {
        self.log.lock().unwrap().contains(text)
    }

    /// Puts another token where the agent reads it, as the kubelet does: at once.
    pub(super) fn rotate(&self, token: &str) {
        let new: PathBuf = self.folder.path().join("token.new");
        fs::write(&new, token).unwrap();
        fs::rename(new, self.folder.path().join("token")).unwrap();
    }

    /// Stops it in its tracks, so that it misses what happens; its sockets stay open.
    pub(super) fn freeze(&self) {
        kill_process(Pid::from_child(&self.child), Signal::STOP).unwrap();
    }

    pub(super) fn thaw(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the agent's output\n{}---", self.log.lock().unwrap());
        }
        // Ended already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let (head, body) = exchange(address, path);
    (status(&head), body)
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// The head and the body of an answer.
fn exchange(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

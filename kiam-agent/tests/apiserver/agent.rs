//! The real agent on loopback with source-IP identity, and what pods and operators ask of it.

use std::{fs, net::SocketAddr, path::PathBuf};

use lab::{
    fake::{
        Place,
        sts::{Issued, Sts},
    },
    loopback::{self, LoopbackAgent},
};
use serde_json::{Value, json};

use super::server::Server;

const NODE_KEY: &str = "AKIANODE";
pub(super) const BASE: &str = "arn:aws:iam::123456789012:role/";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// The agent of the node `n1`, which ends with this value.
pub(super) struct Agent {
    running: LoopbackAgent,
    pub(super) sts: Sts,
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
        let base = format!("--role-base-arn={BASE}");
        let own = ["--namespace-policy=required", base.as_str()];
        let flags = [&own, flags].concat();
        let running = LoopbackAgent::start(folder, &sts.url(), Some(NODE_KEY), &flags).unwrap();
        Self { running, sts }
    }

    /// What a pod at the agent's own address is told about its role.
    pub(super) fn role(&self) -> (u16, String) {
        get(self.running.pods(), ROLES)
    }

    /// Why the pod is told no role, and with which status.
    pub(super) fn refusal(&self) -> Option<(u16, String)> {
        let answer = loopback::get(self.running.pods(), ROLES).unwrap();
        (!answer.reason().is_empty()).then(|| (answer.status, answer.reason().to_owned()))
    }

    /// Whether the pod gets credentials of `role`, which STS made for the node.
    pub(super) fn gives(&self, role: &str) -> bool {
        self.issued(role).is_some_and(|issued| issued.caller == NODE_KEY)
    }

    /// What STS made the pod's credentials of `role` for; `None` where it gets none.
    pub(super) fn issued(&self, role: &str) -> Option<Issued> {
        let (status, body) = get(self.running.pods(), &format!("{ROLES}{role}"));
        let body: Value = serde_json::from_str(&body).ok().filter(|_| status == 200)?;
        let issued = self.sts.owner(body["AccessKeyId"].as_str().unwrap()).unwrap();
        (issued.role == format!("{BASE}{role}")).then_some(issued)
    }

    pub(super) fn is_ready(&self) -> bool {
        get(self.running.admin(), "/ready").0 == 200
    }

    /// A counter or gauge, by its name with labels; 0 where nothing was counted yet.
    pub(super) fn metric(&self, name: &str) -> f64 {
        let (_, text) = get(self.running.admin(), "/metrics");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Whether its log has `text`.
    pub(super) fn said(&self, text: &str) -> bool {
        self.running.said(text)
    }

    /// Puts another token where the agent reads it, as the kubelet does: at once.
    pub(super) fn rotate(&self, token: &str) {
        let new: PathBuf = self.running.folder().join("token.new");
        fs::write(&new, token).unwrap();
        fs::rename(new, self.running.folder().join("token")).unwrap();
    }

    /// Stops it in its tracks, so that it misses what happens; its sockets stay open.
    pub(super) fn freeze(&self) {
        self.running.freeze().unwrap();
    }

    pub(super) fn thaw(&self) {
        self.running.thaw().unwrap();
    }
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = loopback::get(address, path).unwrap();
    (answer.status, answer.body)
}

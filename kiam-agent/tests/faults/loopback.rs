//! The agent's own program on loopback, with pods that are records and addresses of 127.0.0.0/8.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use lab::{
    fake::{
        Place,
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord},
        sts::Sts,
    },
    loopback::{self, LoopbackAgent},
    pod_client::{Attempt, Options, attempt},
    role_arn, role_base_arn,
};

use super::AGENT;

const NODE_KEY: &str = "AKIANODE";

/// The agent and its neighbours.
pub(super) struct Node {
    agent: LoopbackAgent,
    pub(super) kubernetes: Kubernetes,
    pub(super) sts: Sts,
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
        let base = format!("--role-base-arn={}", role_base_arn());
        let flags = [&[base.as_str()], flags].concat();
        let (binary, sts_url) = (Path::new(AGENT), sts.url());
        let agent = LoopbackAgent::start(binary, folder, &sts_url, Some(NODE_KEY), &flags).unwrap();
        Self { agent, kubernetes, sts }
    }

    /// Asks as the pod's SDK does: token, role, credentials.
    pub(super) fn ask(&self, pod: &Pod) -> Attempt {
        let pods = self.agent.pods();
        let (to, bind) = (Some(pods.ip()), Some(pod.address()));
        attempt(&Options { to, port: pods.port(), bind, ..Options::default() })
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
        let answer = loopback::get(self.agent.admin(), path).unwrap();
        loopback::parts(&answer).unwrap().0
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

/// Why an attempt was refused.
pub(super) fn reason(attempt: &Attempt) -> &str {
    attempt.headers.get("x-kiam-reason").map(String::as_str).unwrap_or_default()
}

//! How much memory the agent takes when others make objects large, many, or change them all the time: the real binary on
//! loopback, with a small Kubernetes API and a small STS over real HTTP.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{net::IpAddr, path::Path};

use lab::{
    eventually,
    fake::{
        Place,
        kubernetes::{Kubernetes, NamespaceRecord, PodRecord, ServiceAccountRecord},
        sts::Sts,
    },
    loopback::{self, LoopbackAgent},
    pod_client::{Attempt, Options, attempt},
    role_arn, role_base_arn,
};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const NODE_KEY: &str = "AKIANODE";
const MIB: u64 = 1024 * 1024;
/// More than this the agent never takes, whatever there is in the cluster: the manifest's limit is 256 MiB.
const MOST: u64 = 80 * MIB;

/// The agent with its neighbours, and a pod whose role nobody may keep from it.
struct Node {
    agent: LoopbackAgent,
    kubernetes: Kubernetes,
    sts: Sts,
}

impl Node {
    /// Starts the agent in a cluster that `prepare` has filled, besides the victim.
    fn start(flags: &[&str], prepare: impl FnOnce(&Kubernetes)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kubernetes = Kubernetes::start(Place::loopback()).unwrap();
        let sts = Sts::start(Place::loopback(), NODE_KEY).unwrap();
        kubernetes.write_kubeconfig(&folder.path().join("kubeconfig")).unwrap();
        prepare(&kubernetes);
        kubernetes.ensure_namespace(&NamespaceRecord::new("shop"));
        kubernetes.apply_service_account(&ServiceAccountRecord::new("shop", "default"));
        kubernetes.apply_pod(&pod("orders", 1).annotation("iam.amazonaws.com/role", "orders"));
        let base = format!("--role-base-arn={}", role_base_arn());
        let flags = [&[base.as_str()], flags].concat();
        let (binary, sts_url) = (Path::new(AGENT), sts.url());
        let agent = LoopbackAgent::start(binary, folder, &sts_url, Some(NODE_KEY), &flags).unwrap();
        Self { agent, kubernetes, sts }
    }

    /// Asks as the SDK of pod `number` does.
    fn ask(&self, number: u8) -> Attempt {
        let pods = self.agent.pods();
        let (to, bind) = (Some(pods.ip()), Some(address(number)));
        attempt(&Options { to, port: pods.port(), bind, ..Options::default() })
    }

    fn serves(&self, number: u8, role: &str) -> bool {
        let key = self.ask(number).field("AccessKeyId");
        let owner = key.and_then(|key| self.sts.owner(&key));
        owner.is_some_and(|owner| owner.role == role_arn(role))
    }

    /// The victim is served, and the agent has never taken more than it may.
    #[track_caller]
    fn judge(&self, what: &str) {
        self.judge_by(what, MOST);
    }

    #[track_caller]
    fn judge_by(&self, what: &str, most: u64) {
        eventually("the victim is served", || self.serves(1, "orders"));
        let peak = self.agent.peak_memory().unwrap();
        eprintln!("{what}: {} MiB", peak / MIB);
        assert!(peak < most, "{what}: the agent took {} MiB", peak / MIB);
    }
}

fn address(number: u8) -> IpAddr {
    [127, 78, 0, number].into()
}

fn pod(name: &str, number: u8) -> PodRecord {
    let uid = format!("{number:08x}-0000-4000-8000-000000000000");
    PodRecord::scheduled("shop", name, &uid, "n1").running(&[address(number)])
}

#[test]
fn large_pods_do_not_fill_it() {
    // As JSON, each of these is six characters.
    let escaped = "\u{1}".repeat(300_000);
    let plain = "x".repeat(1_000_000);
    let node = Node::start(&[], |kubernetes| {
        for n in 2..22 {
            let text = if n % 2 == 0 { &plain } else { &escaped };
            let large = pod(&format!("large-{n}"), n);
            // In what is read, and in what is not.
            let name = if n % 4 < 2 { "iam.amazonaws.com/role" } else { "other" };
            kubernetes.apply_pod(&large.annotation(name, text));
        }
    });
    node.judge("20 pods of 1 MB or more");
    let refused = node.ask(4);
    let reason = refused.headers.get("x-kiam-reason").cloned().unwrap_or_default();
    assert!(reason.contains("iam.amazonaws.com/role: it is too long"), "{refused:?}");
}

#[test]
fn large_namespaces_do_not_fill_it() {
    let text = "x".repeat(250_000);
    let node = Node::start(&[], |kubernetes| {
        let names = ["other", "iam.amazonaws.com/permitted", "iam.amazonaws.com/allowed-roles"];
        for n in 0..1_000 {
            let namespace = NamespaceRecord::new(&format!("large-{n}"));
            kubernetes.apply_namespace(&namespace.annotation(names[n % 3], &text));
        }
    });
    eventually("all namespaces", || node.agent.log().contains("\"count\":1001"));
    node.judge("1,000 namespaces of 250 kB");
}

#[test]
fn many_service_accounts_do_not_fill_it() {
    let node = Node::start(&["--credential-source=web-identity"], |kubernetes| {
        for n in 0..40_000 {
            let (namespace, name) = (format!("team-{}", n / 40), format!("account-{n}"));
            let account = ServiceAccountRecord::new(&namespace, &name);
            let role = format!("arn:aws:iam::123456789012:role/{namespace}/{name}");
            kubernetes
                .apply_service_account(&account.annotation("eks.amazonaws.com/role-arn", &role));
        }
    });
    eventually("all ServiceAccounts", || node.agent.log().contains("\"count\":40001"));
    node.judge("40,000 ServiceAccounts");
}

#[test]
fn many_expressions_do_not_fill_it() {
    let node = Node::start(&[], |kubernetes| {
        for n in 0..256_u32 {
            let name = format!("team-{n}");
            let expression = format!("arn:aws:iam::\\d+:role/{name}/[\\w+=,.@-]+|.*/{name}-\\w*");
            let namespace = NamespaceRecord::new(&name);
            kubernetes
                .apply_namespace(&namespace.annotation("iam.amazonaws.com/permitted", &expression));
            let uid = format!("{n:08x}-1111-4000-8000-000000000000");
            let pod = PodRecord::scheduled(&name, "pod", &uid, "n1");
            kubernetes.apply_pod(&pod.annotation("iam.amazonaws.com/role", "nobody"));
        }
    });
    node.judge_by("256 expressions", 60 * MIB);
}

/// Large objects change, and small ones come and go, as fast as the API takes it.
#[test]
fn storms_do_not_fill_it() {
    let node = Node::start(&[], |_| {});
    node.judge("before the storm");
    let before = node.agent.cpu_time().unwrap();
    let text = "x".repeat(1_000_000);
    let large = pod("large", 2).annotation("other", &text);
    for n in 0..150 {
        let name = format!("name-{n}");
        node.kubernetes
            .apply_pod(&large.clone().annotation("iam.amazonaws.com/session-name", &name));
    }
    for n in 0..40_000 {
        let namespace = NamespaceRecord::new(&format!("a-namespace-of-a-storm-{n}"));
        node.kubernetes.apply_namespace(&namespace);
        node.kubernetes.delete_namespace(&namespace.name);
        if n % 10_000 == 0 {
            node.judge("in a storm");
        }
    }
    let last = pod("last", 3).annotation("iam.amazonaws.com/role", "last");
    node.kubernetes.apply_pod(&last);
    eventually("what comes after the storm", || node.serves(3, "last"));
    eventually("the end of the storm", || {
        let metrics = loopback::get(node.agent.admin(), "/metrics").unwrap();
        metrics.contains(r#"events_total{resource="Namespaces",kind="Deleted"} 40000"#)
    });
    node.judge("after a storm of 150 MB and 80,000 changes");
    let took = node.agent.cpu_time().unwrap() - before;
    eprintln!("it took {took:?} of a processor");
}

//! How much memory the agent takes when others make objects large, many, or change them all the time: the real binary on
//! loopback, with a small Kubernetes API and a small STS over real HTTP.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use lab::{
    eventually,
    fake::kubernetes::{Kubernetes, NamespaceRecord, PodRecord, ServiceAccountRecord},
    loopback::{LoopbackNode, pod, schedule},
};

const MIB: u64 = 1024 * 1024;
/// More than this the agent never takes, whatever there is in the cluster: the manifest's limit is 256 MiB.
const MOST: u64 = 80 * MIB;

/// Starts the agent in a cluster that `prepare` has filled, besides the victim, whose role nobody may keep from it.
fn start(flags: &[&str], prepare: impl FnOnce(&Kubernetes)) -> LoopbackNode {
    let node = LoopbackNode::start(flags, |kubernetes, _| {
        prepare(kubernetes);
        kubernetes.apply_service_account(&ServiceAccountRecord::new("shop", "default"));
        schedule(kubernetes, &pod(1).role("orders"));
    });
    node.unwrap()
}

/// The victim is served, and the agent has never taken more than it may.
#[track_caller]
fn judge(node: &LoopbackNode, what: &str) {
    judge_by(node, what, MOST);
}

#[track_caller]
fn judge_by(node: &LoopbackNode, what: &str, most: u64) {
    let victim = pod(1).role("orders");
    eventually("the victim is served", || node.serves(&victim));
    let peak = node.agent.memory("VmHWM").unwrap();
    eprintln!("{what}: {} MiB", peak / MIB);
    assert!(peak < most, "{what}: the agent took {} MiB", peak / MIB);
}

#[test]
fn large_pods_do_not_fill_it() {
    // As JSON, each of these is six characters.
    let escaped = "\u{1}".repeat(300_000);
    let plain = "x".repeat(1_000_000);
    let node = start(&[], |kubernetes| {
        for n in 2..22 {
            let text = if n % 2 == 0 { &plain } else { &escaped };
            let large = pod(n);
            // In what is read, and in what is not.
            let name = if n % 4 < 2 { "iam.amazonaws.com/role" } else { "other" };
            kubernetes.apply_pod(&large.annotation(name, text));
        }
    });
    judge(&node, "20 pods of 1 MB or more");
    let refused = node.credentials(&pod(4));
    assert!(refused.reason().contains("iam.amazonaws.com/role: it is too long"), "{refused:?}");
}

#[test]
fn large_namespaces_do_not_fill_it() {
    let text = "x".repeat(250_000);
    let node = start(&[], |kubernetes| {
        let names = ["other", "iam.amazonaws.com/permitted", "iam.amazonaws.com/allowed-roles"];
        for n in 0..1_000 {
            let namespace = NamespaceRecord::new(&format!("large-{n}"));
            kubernetes.apply_namespace(&namespace.annotation(names[n % 3], &text));
        }
    });
    eventually("all namespaces", || node.agent.log().contains("\"count\":1001"));
    judge(&node, "1,000 namespaces of 250 kB");
}

#[test]
fn many_service_accounts_do_not_fill_it() {
    let node = start(&["--credential-source=web-identity"], |kubernetes| {
        for n in 0..40_000 {
            let (namespace, name) = (format!("team-{}", n / 40), format!("account-{n}"));
            let account = ServiceAccountRecord::new(&namespace, &name);
            let role = format!("arn:aws:iam::123456789012:role/{namespace}/{name}");
            kubernetes
                .apply_service_account(&account.annotation("eks.amazonaws.com/role-arn", &role));
        }
    });
    eventually("all ServiceAccounts", || node.agent.log().contains("\"count\":40001"));
    judge(&node, "40,000 ServiceAccounts");
}

#[test]
fn many_expressions_do_not_fill_it() {
    let node = start(&[], |kubernetes| {
        for n in 0..256_u32 {
            let name = format!("team-{n}");
            let expression = format!("arn:aws:iam::\\d+:role/{name}/[\\w+=,.@-]+|.*/{name}-\\w*");
            let namespace = NamespaceRecord::new(&name);
            kubernetes
                .apply_namespace(&namespace.annotation("iam.amazonaws.com/permitted", &expression));
            let uid = format!("{n:08x}-1111-4000-8000-000000000000");
            let pod = PodRecord::scheduled(&name, "pod", &uid, "n1");
            kubernetes.apply_pod(&pod.role("nobody"));
        }
    });
    judge_by(&node, "256 expressions", 60 * MIB);
}

/// Large objects change, and small ones come and go, as fast as the API takes it.
#[test]
fn storms_do_not_fill_it() {
    let node = start(&[], |_| {});
    judge(&node, "before the storm");
    let before = node.agent.cpu_time().unwrap();
    let text = "x".repeat(1_000_000);
    let large = pod(2).annotation("other", &text);
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
            judge(&node, "in a storm");
        }
    }
    let last = pod(3).role("last");
    node.kubernetes.apply_pod(&last);
    eventually("what comes after the storm", || node.serves(&last));
    eventually("the end of the storm", || {
        node.metrics().contains(r#"events_total{resource="Namespaces",kind="Deleted"} 40000"#)
    });
    judge(&node, "after a storm of 150 MB and 80,000 changes");
    let took = node.agent.cpu_time().unwrap() - before;
    eprintln!("it took {took:?} of a processor");
}

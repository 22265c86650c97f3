//! How much memory the agent takes, usually and when others make objects large, many, or change them all the time: the
//! real binary with a small Kubernetes API and a small STS over real HTTP, on loopback and on a lab node.
//!
//! The bounds of the usual cases are for what the agent allocates, which every build does alike, and not for its program,
//! which is large in a build for tests. Both are printed.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::thread;

use lab::{
    Process, eventually,
    fake::kubernetes::{Kubernetes, NamespaceRecord, PodRecord, ServiceAccountRecord},
    loopback::{LoopbackNode, pod, schedule},
};

const MIB: u64 = 1024 * 1024;
/// The pods of a node of a usual size, each with a role of its own.
const USUAL_PODS: u16 = 51;
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

/// The most that it has allocated at once: all that it has had, less its program and the libraries.
#[track_caller]
fn judge_own(agent: &Process, what: &str, most: u64) {
    let amount = |field| agent.memory(field).unwrap();
    let (peak, program) = (amount("VmHWM"), amount("RssFile"));
    let own = peak.saturating_sub(program);
    eprintln!(
        "{what}: peak {:.1} MB, of which {:.1} MB its own; now {:.1} MB",
        megabytes(peak),
        megabytes(own),
        megabytes(amount("VmRSS"))
    );
    assert!(own < most, "{what}: the agent allocated {:.1} MB", megabytes(own));
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A pod with a role of its own, or with one that it shares with every 51st. It is not the victim.
fn usual_pod(number: u16) -> PodRecord {
    pod(2 + number).role(&format!("role-{}", number % USUAL_PODS))
}

/// Every pod asks `times` for its credentials, on connections of their own, 32 at once.
fn load(node: &LoopbackNode, pods: u16, times: u16) {
    thread::scope(|scope| {
        for first in 0..32 {
            let asks = move || {
                for number in (0..pods * times).skip(first).step_by(32) {
                    assert!(node.serves(&usual_pod(number % pods)), "pod {}", number % pods);
                }
            };
            scope.spawn(asks);
        }
    });
}

#[test]
fn a_usual_node_takes_little() {
    let node = start(&[], |kubernetes| {
        (0..USUAL_PODS).for_each(|number| schedule(kubernetes, &usual_pod(number)));
    });
    eventually("the first pods are served", || {
        (0..USUAL_PODS).all(|number| node.serves(&usual_pod(number)))
    });
    judge_own(&node.agent, "51 pods", 12_000_000);
    load(&node, USUAL_PODS, 40);
    judge_own(&node.agent, "51 pods, after load", 12_000_000);
}

#[test]
fn a_full_node_in_a_large_cluster_takes_little() {
    const PODS: u16 = 1_000;
    let text = "x".repeat(5_300);
    let node = start(&[], |kubernetes| {
        for number in 0..5_000 {
            let namespace = NamespaceRecord::new(&format!("team-{number}"));
            kubernetes.apply_namespace(&namespace.annotation("other", &text[..200]));
        }
        for number in 0..PODS {
            schedule(kubernetes, &usual_pod(number).annotation("other", &text));
        }
    });
    eventually("the last pod is served", || node.serves(&usual_pod(PODS - 1)));
    judge_own(&node.agent, "1,000 pods, 5,000 namespaces", 20_000_000);
    load(&node, PODS, 4);
    judge_own(&node.agent, "1,000 pods, 5,000 namespaces, after load", 20_000_000);
}

/// With the kernel's part: aya would read the types of the whole kernel, 20 MB, with each object that it loads.
#[test]
fn the_kernels_part_takes_little() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pods = ["orders", "reports", "invoices"].map(|role| lab.pod_of(role));
    for pod in &pods {
        eventually("the pod is served", || {
            pod.credentials().is_ok_and(|attempt| attempt.field("AccessKeyId").is_some())
        });
    }
    judge_own(&agent, "with the kernel's part", 12_000_000);
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

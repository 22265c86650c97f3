//! Broken nodes, and what `kubectl kiam status` names as the cause.

use std::{fs, path::Path, process::Command, thread, time::Duration};

use lab::{
    eventually,
    fake::{
        Injected, Place,
        kubernetes::{Container, Kubernetes},
    },
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::stage::{AGENT, AGENTS, Cluster, agent_pod, pod, script};

/// A node, the state that is shown, and a part of the cause.
const ROWS: &[(&str, &str, &str)] = &[
    ("good", "ok", ""),
    ("tainted", "no-agent", "which has the taint dedicated=db:NoSchedule"),
    ("fargate", "no-agent", "Fargate's nodes run no DaemonSets"),
    ("windows", "no-agent", "the node runs windows"),
    ("unplaced", "no-agent", "no pod of the agent in namespace kube-system is on the node"),
    ("crashing", "crashing", "the kubeconfig"),
    ("image", "starting", "ImagePullBackOff: Back-off pulling image"),
    ("api-down", "not-ready", "it has not listed the node's pods: ServiceError: client error"),
    ("sts-hangs", "ok", "role/slow: STS can't be reached: request has timed out"),
    ("sts-down", "ok", "role/reader: STS can't be reached: dispatch failure"),
    ("denied", "ok", "no credentials of arn:aws:iam::123456789012:role/denied: STS: AccessDenied"),
    ("hung", "no-answer", "the agent's process hangs: "),
    ("slow", "no-answer", "did not answer within 8s"),
    ("dead", "failed", "no agent answers at"),
    ("old", "old", "the agent of kiam-agent-old has no command `status`"),
    ("empty", "failed", "executable file not found"),
    ("kubelet-down", "unreachable", "no command can be run in kiam-agent-kubelet-down"),
];

/// Nodes without an agent, or with one that does not start.
fn without_agents(cluster: &Cluster, folder: &Path) {
    let taint = json!([{ "key": "dedicated", "value": "db", "effect": "NoSchedule" }]);
    cluster.node("tainted", json!({ "spec": { "taints": taint } }));
    let label = |key: &str, value: &str| json!({ "metadata": { "labels": { key: value } } });
    cluster.node("fargate", label("eks.amazonaws.com/compute-type", "fargate"));
    cluster.node("windows", label("kubernetes.io/os", "windows"));
    for node in ["unplaced", "crashing", "image", "old", "empty", "kubelet-down", "slow"] {
        cluster.node(node, json!({}));
    }
    // The words of a real agent that can't start.
    let output = Command::new(AGENT)
        .args(["--host=127.0.0.1", "--interceptor=off", "--kubeconfig=/nonexistent", "--json-log"])
        .args(["--role-base-arn=arn:aws:iam::123456789012:role/", "--region=eu-west-1"])
        .arg(format!("--state-dir={}", folder.join("state").display()))
        .env_clear()
        .output()
        .unwrap();
    assert!(!output.status.success());
    fs::write(folder.join("former-log"), output.stderr).unwrap();
    let waiting = |reason: &str, message: &str| json!({ "waiting": { "reason": reason, "message": message } });
    cluster.pod_of_agent(
        "crashing",
        &json!({
            "state": waiting("CrashLoopBackOff", "back-off 5m0s"), "restartCount": 7,
            "lastState": { "terminated": { "exitCode": 1, "reason": "Error" } },
        }),
    );
    cluster.contain("crashing", folder, Path::new(AGENT));
    cluster.pod_of_agent(
        "image",
        &json!({ "state": waiting("ImagePullBackOff", "Back-off pulling image") }),
    );
    let running = json!({ "state": { "running": {} }, "ready": true });
    for node in ["old", "empty", "kubelet-down", "slow"] {
        cluster.pod_of_agent(node, &running);
    }
    // The real program's answer to a flag that it does not have.
    cluster.contain(
        "old",
        folder,
        &script(folder, "old", &format!("exec {AGENT} status --of-later")),
    );
    let name = "kiam-agent".to_owned();
    let empty = Container { name, ..Container::default() };
    for node in ["empty", "kubelet-down", "slow"] {
        cluster.kubernetes.run_container(AGENTS, &agent_pod(node), empty.clone());
    }
    let exec = |node: &str| format!("/api/v1/namespaces/{AGENTS}/pods/{}/exec", agent_pod(node));
    let faults = cluster.kubernetes.faults();
    faults.inject(Injected::refuse(500, "InternalError").path(&exec("kubelet-down")));
    faults.inject(Injected::hang().path(&exec("slow")));
}

fn findings<'a>(report: &'a Value, node: &str) -> (&'a str, String) {
    let nodes = report["nodes"].as_array().unwrap();
    let node = nodes.iter().find(|it| it["node"] == node).unwrap();
    (node["state"].as_str().unwrap(), node["findings"].to_string())
}

#[test]
fn the_cause_of_each_broken_node_is_named() {
    let cluster = Cluster::start();
    let folder = tempfile::tempdir().unwrap();
    without_agents(&cluster, folder.path());
    let denied = "arn:aws:iam::123456789012:role/denied";
    let faults = cluster.sts.faults();
    faults.inject(Injected::refuse(403, "AccessDenied").field("RoleArn", denied));
    let slow = "arn:aws:iam::123456789012:role/slow";
    let hang = faults.inject(Injected::hang().field("RoleArn", slow));
    cluster.namespace("shop", &[]);
    for (number, node, role) in [
        (1, "good", "reader"),
        (2, "denied", "denied"),
        (3, "sts-down", "reader"),
        (4, "sts-hangs", "slow"),
    ] {
        cluster.kubernetes.apply_pod(&pod(node, "shop", node, number).role(role));
    }
    let away = Kubernetes::start(Place::loopback()).unwrap();
    away.stop();
    let agents = ["good", "denied", "hung", "dead"].map(|node| cluster.agent(node, &[]));
    let _api_down = cluster.agent_of("api-down", &away, &cluster.sts.url(), &[]);
    // Nothing listens there.
    let _sts_down = cluster.agent_of("sts-down", &cluster.kubernetes, "http://127.0.0.1:9", &[]);
    let _sts_hangs = thread::scope(|scope| {
        let starting = scope.spawn(|| cluster.agent("sts-hangs", &[]));
        eventually("an agent that waits for STS", || {
            let report = cluster.json(&["status", "--node=sts-hangs"]);
            let waits = "it has not got the first credentials";
            report["nodes"][0]["state"] == "not-ready" && report.to_string().contains(waits)
        });
        starting.join().unwrap()
    });
    let [_good, _denied, hung, mut dead] = agents;
    eventually("the good node's credentials, and the denial", || {
        let report = cluster.json(&["status", "--node=good", "--node=denied"]);
        findings(&report, "good").0 == "ok"
            && findings(&report, "denied").1.contains("AccessDenied")
    });
    // The call to STS that hangs ends after ten seconds, and not always before all others have started.
    eventually("the end of the call that hangs", || {
        let report = cluster.json(&["status", "--node=sts-hangs"]);
        findings(&report, "sts-hangs").0 == "ok"
    });
    dead.kill().unwrap();
    let pid = Pid::from_raw(hung.pid().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let report = cluster.json(&["status", "--timeout=8s"]);
    let text = cluster.ctl(&["status", "--timeout=8s"]);
    kill_process(pid, Signal::CONT).unwrap();
    hang.lift();
    assert_eq!(report["nodes"].as_array().unwrap().len(), ROWS.len(), "{report:#}");
    for (node, state, part) in ROWS {
        let (is, why) = findings(&report, node);
        assert_eq!(is, *state, "{node}: {why}");
        assert!(why.contains(part), "{node}: {part:?} is missing from {why}");
        let part = part.split(':').next().unwrap();
        assert!(text.text.contains(part), "{node}: {part:?} is missing from\n{}", text.text);
    }
    assert_eq!(text.code, Some(1));
    assert!(text.text.contains("4 of 17 nodes have an agent that is ready"), "{}", text.text);
}

#[test]
fn a_node_that_does_not_exist_is_no_success() {
    let cluster = Cluster::start();
    assert_eq!(cluster.ctl(&["status"]).code, Some(1), "no nodes");
    let _agent = cluster.agent("n1", &[]);
    for (words, code) in [
        (&["status", "--node=n1"][..], 0),
        (&["status", "--node=n1", "--node=n2"], 1),
        (&["status", "--node=n2"], 1),
        (&["check", "--node=n2"], 1),
    ] {
        let said = cluster.ctl(words);
        assert_eq!(said.code, Some(code), "{words:?}: {said:?}");
        assert_eq!(said.text.contains("there is no node n2"), code == 1, "{words:?}: {said:?}");
    }
    for command in ["pods", "v1-users"] {
        let said = cluster.ctl(&[command]);
        assert_eq!((said.code, &*said.errors), (Some(0), ""), "{said:?}");
        assert_eq!(cluster.ctl(&[command, "--node=n2"]).code, Some(1));
    }
    cluster.node("silent", json!({}));
    for command in ["pods", "v1-users"] {
        for form in ["text", "json"] {
            let said = cluster.ctl(&[command, "--output", form]);
            assert_eq!(said.code, Some(1), "{said:?}");
            assert!(said.errors.contains("left out: silent (no agent)\n"), "{said:?}");
        }
    }
    let broken = cluster.laptop.path().join("broken");
    fs::write(&broken, "clusters: [").unwrap();
    let said = cluster.ctl(&["status", &format!("--kubeconfig={}", broken.display())]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.errors.contains("broken") && !said.errors.contains('\u{fffd}'), "{said:?}");
}

#[test]
fn without_the_right_to_run_commands_each_node_says_so() {
    let cluster = Cluster::start();
    let _agent = cluster.agent("n1", &[]);
    cluster.kubernetes.deny("create", "pods/exec");
    let said = cluster.ctl(&["status"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    for part in [
        "forbidden",
        "cannot create resource \"pods/exec\"",
        "needs get and create of pods/exec in namespace kube-system",
    ] {
        assert!(said.text.contains(part), "{part}: {said:?}");
    }
    let forbidden = Injected::refuse(403, "Forbidden").path("/api/v1/nodes");
    cluster.kubernetes.faults().inject(forbidden);
    let said = cluster.ctl(&["status"]);
    assert!(said.text.contains("nodes without an agent are not shown: "), "{said:?}");
    assert!(said.text.contains("n1"), "{said:?}");
}

#[test]
fn nodes_are_asked_beside_each_other_and_a_slow_one_holds_up_none() {
    let cluster = Cluster::start();
    let agent = cluster.agent("n0", &[]);
    let running = json!({ "state": { "running": {} }, "ready": true });
    for number in 1..200 {
        let node = format!("n{number}");
        cluster.node(&node, json!({}));
        cluster.pod_of_agent(&node, &running);
        cluster.contain(&node, agent.folder(), Path::new(AGENT));
        if number % 10 == 0 {
            let path = format!("/api/v1/namespaces/{AGENTS}/pods/{}/exec", agent_pod(&node));
            cluster.kubernetes.faults().inject(Injected::hang().path(&path));
        }
    }
    let begun = tokio::time::Instant::now();
    let report = cluster.json(&["status", "--timeout=20s", "--parallel=64"]);
    let nodes = report["nodes"].as_array().unwrap();
    let count = |state: &str| nodes.iter().filter(|node| node["state"] == state).count();
    assert_eq!((count("ok"), count("no-answer")), (181, 19), "{report:#}");
    // One after the other they would take 380 s.
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
}

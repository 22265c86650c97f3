//! The taint that keeps pods from a new node, and the agent there that takes it off.

use std::{thread, time::Duration};

use http::Method;
use lab::{Agent, NODE_NAME, PodSpec, eventually, fake::Injected};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const KEY: &str = "kiam.example.com/agent-not-ready";
const FLAG: &str = "--startup-taint=kiam.example.com/agent-not-ready";
const NODE: &str = "/api/v1/nodes/lab-node";

/// The agent's taint with two effects, and another whose last part no release knows yet.
fn taints() -> [Value; 3] {
    let ours = |effect| json!({ "key": KEY, "effect": effect });
    let other = json!({ "key": "dedicated", "value": KEY, "effect": "NoSchedule", "new": [1] });
    [ours("NoSchedule"), other, ours("NoExecute")]
}

fn is_ready(agent: &Agent) -> bool {
    agent.admin("/ready").is_ok_and(|reply| reply.status == 200)
}

#[test]
fn the_taint_goes_once_the_agent_is_ready_and_no_other_with_it() {
    let Some(lab) = lab::node_test!() else { return };
    lab.kubernetes.apply_node(NODE_NAME, &taints());
    // Pods of another node are none of its business.
    lab.kubernetes.apply_node("other-node", &taints());
    let _pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let hung = lab.sts.faults().inject(Injected::hang());
    let agent = lab.begin_agent(&[FLAG]);
    eventually("a call to STS", || hung.met() > 0);
    thread::sleep(Duration::from_secs(1));
    assert_eq!((is_ready(&agent), lab.kubernetes.taints(NODE_NAME).len()), (false, 3));
    hung.lift();
    let rest = [taints()[1].clone()];
    eventually("the node without the taint", || lab.kubernetes.taints(NODE_NAME) == rest);
    assert!(is_ready(&agent), "the taint is gone, and the agent is not ready");
    assert_eq!(lab.kubernetes.taints("other-node"), taints());
    eventually("what became of it", || {
        agent.admin("/ready").unwrap().body.contains("agent-not-ready: not on the node")
    });
}

#[test]
fn who_may_not_or_is_too_late_tries_again_and_says_so() {
    let Some(lab) = lab::node_test!() else { return };
    lab.kubernetes.apply_node(NODE_NAME, &taints());
    let patched = |injected: Injected| injected.method(Method::PATCH).path(NODE);
    let faults = lab.kubernetes.faults();
    let forbidden = faults.inject(patched(Injected::refuse(403, "Forbidden")));
    let mut agent = lab.begin_agent(&[FLAG]);
    // It is ready all the same.
    agent.wait_ready(LIMIT).unwrap();
    let said = || agent.admin("/ready").unwrap().body;
    eventually("what to do", || said().contains("apply deploy/startup-taint"));
    assert_eq!(lab.kubernetes.taints(NODE_NAME), taints());
    // Somebody else's change comes between its look at the node and its own.
    let raced = faults.inject(patched(Injected::hang()));
    forbidden.lift();
    eventually("another try", || raced.met() > 0);
    let [ours, other, _] = taints();
    let more = json!({ "key": "new", "effect": "NoSchedule" });
    lab.kubernetes.apply_node(NODE_NAME, &[ours, other.clone(), more.clone()]);
    let tries = || lab.kubernetes.seen().iter().filter(|seen| seen.method == Method::PATCH).count();
    let before = tries();
    raced.lift();
    let rest = [other, more];
    eventually("the node with the other's change", || lab.kubernetes.taints(NODE_NAME) == rest);
    assert_eq!(tries(), before + 1, "the first was not refused for its age");
}

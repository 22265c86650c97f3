//! The agent's self-test, with the real agent on a lab node.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{thread, time::Duration};

use kiam_kernel::pins::AttachLock;
use lab::{Agent, Lab, PodSpec};
use tokio::time::Instant;

const READY_LIMIT: Duration = Duration::from_secs(120);

/// Waits until `/ready` answers `status` with `text` in its body.
fn eventually(agent: &Agent, status: u16, text: &str) {
    eventually_while(agent, status, text, || ());
}

/// Waits until `/ready` fails with `part` in its body while the link at `pin` is kept detached. The agent, whose turn it is not,
/// puts it back after two seconds.
fn eventually_without(lab: &Lab, agent: &Agent, pin: &str, part: &str) {
    let pin = lab.pins().join("v2").join(pin);
    eventually_while(agent, 503, part, || lab.node.detach_link(&pin).unwrap());
}

fn eventually_while(agent: &Agent, status: u16, text: &str, again: impl Fn()) {
    let started = Instant::now();
    loop {
        again();
        let reply = agent.admin("/ready").unwrap();
        if reply.status == status && reply.body.contains(text) {
            return;
        }
        let late = started.elapsed() > READY_LIMIT;
        assert!(!late, "no {status} with {text:?}: {} {}", reply.status, reply.body);
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_self_test_passes_with_every_guard_and_nothing_of_it_reaches_the_imds() {
    if lab::skip!() {
        return;
    }
    for further in [
        &[][..],
        &["--guard=skb"],
        &["--guard=route,skb", "--host-network-pods=intercept"],
        &["--identity=source-ip"],
    ] {
        let lab = Lab::start().unwrap();
        let agent = lab.agent(further);
        eventually(&agent, 200, "self-test: passed");
        let foreign: Vec<_> = lab.imds.packets().into_keys().collect();
        let only_node = foreign.iter().all(|address| lab::Node::has_address(*address));
        assert!(only_node, "{further:?}: {foreign:?}");
        let metrics = agent.metrics();
        assert!(metrics.contains("kiam_selftest_runs_total{outcome=\"Passed\"} 1"), "{metrics}");
        assert!(metrics.contains("identity=\"Selftest\""), "{further:?}: {metrics}");
    }
}

#[test]
fn a_hook_that_is_taken_away_costs_readiness_and_is_named() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let agent = lab.agent(&["--selftest-interval=1s"]);
    // While another agent attaches its programs, this one puts nothing back at once.
    let lock = AttachLock::take(&lab.pins()).unwrap().unwrap();
    for (pin, part) in [("link_kiam_sendmsg4", "Datagram"), ("link_kiam_connect6", "Mapped")] {
        eventually_without(&lab, &agent, pin, part);
    }
    // What still holds goes on.
    lab.assert_served(&pod, "orders");
    drop(lock);
    eventually(&agent, 200, "self-test: passed");
}

#[test]
fn without_a_guard_the_proof_asks_only_for_what_is_promised_and_with_one_it_sees_leaks() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&["--guard=none"]);
    eventually(&agent, 200, "self-test: passed");
    // Its raw packet and its rewritten connect have left the node, and the real service has seen them.
    assert!(lab.imds.packets().keys().any(|address| !lab::Node::has_address(*address)));
    drop(agent);
    // With the program of the guard taken away, and put on the flags, both are noticed.
    let lab = Lab::start().unwrap();
    let agent = lab.agent(&["--guard=skb", "--selftest-interval=1s"]);
    let _lock = AttachLock::take(&lab.pins()).unwrap().unwrap();
    for part in ["Ancestor", "Raw"] {
        eventually_without(&lab, &agent, "link_kiam_guard", part);
    }
}

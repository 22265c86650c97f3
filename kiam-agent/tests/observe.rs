//! `--mode=observe`: everything is seen, and nothing changes.
use std::{thread, time::Duration};

use lab::{
    Agent, PodSpec,
    fake::imds::NODE_ACCESS_KEY,
    pod_client::{Options, Via},
    role_arn,
};
use tokio::time::Instant;

const READY_LIMIT: Duration = Duration::from_secs(120);

/// Waits until the agent's log has all of `lines`' words, each in one line.
fn eventually_logged(agent: &Agent, lines: &[&[&str]]) {
    let started = Instant::now();
    loop {
        let log = agent.log();
        let has =
            |words: &&[&str]| log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        if lines.iter().all(has) {
            return;
        }
        assert!(started.elapsed() < READY_LIMIT, "no {lines:?} in:\n{log}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn observing_changes_nothing_and_tells_who_would_get_what() {
    let Some(lab) = lab::node_test!() else { return };
    // An agent that enforced left its guard and programs behind; the mode is what the operator says now.
    let mut enforcing = lab.agent(&[]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    assert_eq!(lab.role_of(&pod.credentials().unwrap()), Some(role_arn("orders")));
    enforcing.kill().unwrap();
    let agent = lab.agent(&["--mode=observe"]);
    let scratch = lab.pod(PodSpec::new("shop", "scratch")).unwrap();
    for pod in [&pod, &scratch] {
        for via in [Via::V4, Via::V6] {
            let attempt = pod.ask_once(&Options { via, ..Options::default() }).unwrap();
            let key = attempt.field("AccessKeyId");
            assert_eq!(key.as_deref(), Some(NODE_ACCESS_KEY), "{via:?}: {attempt:?}");
        }
    }
    let datagram = scratch.ask_once(&Options { via: Via::Udp, ..Options::default() }).unwrap();
    assert_eq!(datagram.error, None, "{datagram:?}");
    eventually_logged(
        &agent,
        &[
            &["would get its role", "orders", &role_arn("orders"), "redirected"],
            &["would get no role", "scratch", "no annotation", "redirected"],
            &["would get no role", "scratch", "denied_datagram"],
        ],
    );
    let metrics = agent.metrics();
    for line in [
        "kiam_observed_pods{would=\"Allowed\"} 1",
        "kiam_observed_pods{would=\"NoRole\"} 1",
        "kiam_intercept_verdicts_total{verdict=\"observed\"} 5",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
    drop(agent);
    let _agent = lab.agent(&[]);
    assert_eq!(lab.role_of(&pod.credentials().unwrap()), Some(role_arn("orders")));
}

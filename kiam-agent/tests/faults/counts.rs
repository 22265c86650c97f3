//! How often STS is asked, and how early.

use std::{collections::BTreeMap, thread, time::Duration};

use lab::{
    PodSpec,
    fake::{
        Injected,
        kubernetes::{Kubernetes, PodRecord},
    },
    loopback,
    pod_client::Options,
    role_arn,
};
use tokio::time::Instant;

use super::{eventually, pod, start};

const PODS: u16 = 200;
const ROLES: u16 = 20;

/// One call a role.
fn one_call_each() -> BTreeMap<(String, String), u64> {
    let key = |n: u16| ("AssumeRole".to_owned(), role_arn(&format!("role-{n}")));
    (0..ROLES).map(|n| (key(n), 1)).collect()
}

#[test]
fn a_cold_node_of_200_pods_and_20_roles_makes_exactly_20_calls() {
    let pods: Vec<PodRecord> = (0..PODS).map(|n| pod(n, &format!("role-{}", n % ROLES))).collect();
    let schedule = |node: &Kubernetes| {
        pods.iter().for_each(|pod| loopback::schedule(node, pod));
    };
    // All are there before the agent, and all come at once to an agent that is there.
    for before in [true, false] {
        let node = start(&[], |kubernetes, sts| {
            sts.faults().inject(Injected::slow(Duration::from_millis(300)));
            if before {
                schedule(kubernetes);
            }
        });
        if !before {
            schedule(&node.kubernetes);
        }
        for pod in &pods {
            eventually("credentials", || node.credentials(pod).status == Some(200));
            node.assert_served(pod);
        }
        assert_eq!(node.sts.counts(), one_call_each());
    }
}

#[test]
fn a_cold_lab_node_asks_once_a_role_and_real_pods_are_served() {
    let Some(lab) = lab::node_test!() else { return };
    let spec =
        |n: u16| PodSpec::new("shop", &format!("pod-{n}")).role(&format!("role-{}", n % ROLES));
    (5..PODS).for_each(|n| drop(lab.schedule(spec(n)).unwrap()));
    let pods: Vec<_> = (0..5).map(|n| (n, lab.pod(spec(n)).unwrap())).collect();
    let _agent = lab.agent(&[]);
    for (n, pod) in &pods {
        let attempt = pod.credentials().unwrap();
        assert_eq!(lab.role_of(&attempt), Some(role_arn(&format!("role-{n}"))), "{attempt:?}");
    }
    assert_eq!(lab.sts.counts(), one_call_each());
}

#[test]
fn an_sts_of_three_seconds_is_not_noticed_by_pods_that_were_scheduled_five_seconds_before() {
    let Some(lab) = lab::node_test!() else { return };
    let _agent = lab.agent(&[]);
    lab.sts.faults().inject(Injected::slow(Duration::from_secs(3)));
    let roles: Vec<String> = (0..10).map(|n| format!("role-{n}")).collect();
    let scheduled = Instant::now();
    let specs: Vec<PodSpec> = roles
        .iter()
        .map(|role| lab.schedule(PodSpec::new("shop", role).role(role)).unwrap())
        .collect();
    // Sandboxes, images and init containers take at least as long.
    thread::sleep(Duration::from_secs(5).saturating_sub(scheduled.elapsed()));
    // One attempt of one second, as SDKs make by default.
    let options = Options { timeout_ms: 1000, ..Options::default() };
    for (role, spec) in roles.iter().zip(specs) {
        let pod = lab.node.pod(spec).unwrap();
        let attempt = pod.ask_once(&options).unwrap();
        lab.assert_role(&attempt, role);
        assert!(attempt.micros < 1_000_000, "{attempt:?}");
    }
    assert_eq!(lab.sts.requests(), 10);
}

//! What `--path` says of pods that no listener can be opened in.

use std::{thread, time::Duration};

use lab::{
    IMDS_V4, Lab, LabPod, PodSpec, eventually, eventually_is,
    pod_client::{
        Options, Via,
        attack::{Attack, stream::Way},
    },
};

use super::{INSIDE, ON_THE_NODE, explain, is_served, path_of, pod_inside, port_inside};

const NO_LISTENER: &str = "denied_path";
const LO_IS_DOWN: &str = "lo is down in the pod's network namespace";
const WAYS: [Via; 3] = [Via::V4, Via::V4Mapped, Via::V6];

/// A pod that runs, and whose loopback is down.
fn pod_without_loopback(lab: &Lab, role: &str) -> LabPod {
    let spec = lab.schedule(PodSpec::new("shop", role).role(role)).unwrap();
    let mut pod = lab.node.pod(spec).unwrap();
    pod.netns().ip("link set lo down\n").unwrap();
    pod.pause().unwrap();
    lab.publish(&pod);
    pod
}

#[test]
fn pod_local_refuses_a_pod_until_it_has_a_listener() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let agent = lab.agent(&["--path=pod-local"]);
    let pod = pod_without_loopback(&lab, "orders");
    let down = format!("denied: {LO_IS_DOWN}");
    eventually_is("its path", &down, || path_of(&lab, &pod));
    let (denied, node) = (agent.verdicts(NO_LISTENER), agent.verdicts(ON_THE_NODE));
    for via in WAYS {
        let attempt = pod.ask_once(&Options { via, ..Options::default() }).unwrap();
        assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{via:?}: {attempt:?}");
    }
    assert_eq!(agent.verdicts(NO_LISTENER) - denied, 3);
    let (granted, why) = explain(&lab, "shop/orders");
    assert!(!granted && why.contains("none, it can't connect: denied: "), "{why}");
    pod.netns().ip("link set lo up\n").unwrap();
    // Each of its processes that comes makes the agent look again.
    let served = || is_served(&lab, &pod.credentials().unwrap(), "orders");
    eventually("credentials", served);
    port_inside(&lab, &pod);
    let (granted, why) = explain(&lab, "shop/orders");
    assert!(granted && why.contains("pod-local: listening on port"), "{why}");
    for via in WAYS {
        let attempt = pod.ask_once(&Options { via, ..Options::default() }).unwrap();
        lab.assert_role(&attempt, "orders");
    }
    assert_eq!(agent.verdicts(ON_THE_NODE), node, "none by the node");
}

#[test]
fn auto_serves_a_pod_by_the_node_until_it_has_a_listener() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = pod_without_loopback(&lab, "orders");
    let down = format!("node: {LO_IS_DOWN}");
    eventually_is("its path", &down, || path_of(&lab, &pod));
    let node = agent.verdicts(ON_THE_NODE);
    for via in [Via::V4, Via::V4Mapped] {
        let attempt = pod.ask_once(&Options { via, ..Options::default() }).unwrap();
        lab.assert_role(&attempt, "orders");
    }
    assert!(agent.verdicts(ON_THE_NODE) >= node + 2, "by the node");
    pod.netns().ip("link set lo up\n").unwrap();
    let inside = || {
        lab.assert_served(&pod, "orders");
        path_of(&lab, &pod).starts_with("pod-local")
    };
    eventually("it has a listener", inside);
    let (inside, node) = (agent.verdicts(INSIDE), agent.verdicts(ON_THE_NODE));
    for via in WAYS {
        let attempt = pod.ask_once(&Options { via, ..Options::default() }).unwrap();
        lab.assert_role(&attempt, "orders");
    }
    assert!(agent.verdicts(INSIDE) >= inside + 3);
    assert_eq!(agent.verdicts(ON_THE_NODE), node, "none by the node any more");
}

#[test]
fn who_asks_late_or_in_pieces_is_answered() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let _agent = lab.agent(&[]);
    let pod = pod_inside(&lab, "orders");
    lab.assert_served(&pod, "orders");
    let mut client = pod.attacker().unwrap();
    client.must(Attack::Keep { way: Way::Connect, to: (IMDS_V4, 80).into() }).unwrap();
    // Longer than the listener inside waits for the first bytes.
    thread::sleep(Duration::from_millis(2500));
    for _ in 0..5 {
        for part in [
            "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\n",
            "Host: 169.254.169.254\r\n\r\n",
        ] {
            client.must(Attack::Write { text: part.to_owned() }).unwrap();
        }
        let answer = client.attempt(Attack::Read, 5000).unwrap().body;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("orders"), "{answer}");
    }
}

//! Who else comes to a listener inside a pod, or takes its place.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    thread,
    time::Duration,
};

use lab::{
    Agent, Attacker, Lab, LabPod, eventually_is,
    pod_client::{Attempt, Imds, Options, Via, attack::Attack},
};
use tokio::time::Instant;

use super::{inside, many_pods, path_of, pod_inside, port_inside};

fn to_port(address: &str, port: u16, imds: Imds) -> Options {
    let to = Some(address.parse().unwrap());
    let path = "/latest/meta-data/iam/security-credentials/orders";
    Options { to, port, imds, ..Options::get(path) }
}

fn connections(agent: &Agent, identity: &str) -> u64 {
    agent.metric(&format!("kiam_serve_connections_total{{identity=\"{identity}\"}}"))
}

fn assert_forbidden(attempt: &Attempt, who: &str) {
    let got = (attempt.status, attempt.body.as_str(), attempt.error.as_deref());
    assert_eq!(got, (Some(403), "", None), "{who}: {attempt:?}");
}

#[test]
fn who_comes_to_the_listener_without_a_recorded_connect_is_refused() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = pod_inside(&lab, "orders");
    lab.assert_served(&pod, "orders");
    let port = port_inside(&lab, &pod);
    let before = connections(&agent, "NoEntry");
    for address in ["127.0.0.1", "::1"] {
        for imds in [Imds::V1, Imds::V2] {
            let asked = to_port(address, port, imds);
            // As by a proxy in the pod that is made to connect there.
            assert_forbidden(&pod.ask_once(&asked).unwrap(), "the pod itself");
            // As by `kubectl port-forward`.
            let attempt = lab.node.ask_inside(pod.netns(), &asked).unwrap();
            assert_forbidden(&attempt, "the host");
        }
    }
    assert_eq!(connections(&agent, "NoEntry") - before, 8);
    // The listener is on the loopback alone.
    for address in pod.ips() {
        let attempt = pod.ask_once(&to_port(&address.to_string(), port, Imds::V1)).unwrap();
        assert_eq!(attempt.error.as_deref(), Some("ECONNREFUSED"), "{attempt:?}");
    }
    // The hooks are not the host's, but neither is there a route from a pod to the metadata service.
    let attempt = lab.node.ask_inside(pod.netns(), &Options::default()).unwrap();
    assert_eq!(attempt.error.as_deref(), Some("EHOSTUNREACH"), "{attempt:?}");
}

#[test]
fn another_pods_process_inside_gets_nothing_of_either() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let agent = lab.agent(&[]);
    let owner = pod_inside(&lab, "orders");
    let visitor = pod_inside(&lab, "reports");
    lab.assert_served(&owner, "orders");
    let before = agent.verdicts("denied_namespace");
    for via in [Via::V4, Via::V4Mapped, Via::V6] {
        for imds in [Imds::V1, Imds::V2] {
            let asked = Options { via, imds, ..Options::default() };
            let attempt = visitor.ask_inside(owner.netns(), &asked).unwrap();
            assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{attempt:?}");
        }
    }
    assert_eq!(agent.verdicts("denied_namespace") - before, 6);
    lab.assert_served(&owner, "orders");
    lab.assert_served(&visitor, "reports");
}

/// A process of a pod's that has taken a port.
fn squat(pod: &LabPod, port: u16) -> Attacker {
    let mut attacker = pod.attacker().unwrap();
    for at in [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()] {
        attacker.must(Attack::Squat { at, reuse_port: false }).unwrap();
    }
    attacker
}

#[test]
fn a_port_that_somebody_takes_after_a_crash_is_nobodys() {
    if lab::skip!() || lab::no_netns_cookies() {
        return;
    }
    const PODS: usize = 250;
    let lab = Lab::start().unwrap();
    let mut agent = lab.agent(&[]);
    let pod = pod_inside(&lab, "orders");
    let further = many_pods(&lab, PODS - 1);
    eventually_is("pods with a listener", &PODS, || inside(&lab));
    lab.assert_served(&pod, "orders");
    let port = port_inside(&lab, &pod);
    agent.kill().unwrap();
    let eperm = |when: &str| {
        for via in [Via::V4, Via::V4Mapped, Via::V6] {
            for pod in [&pod, &further[0]] {
                let attempt = pod.ask_once(&Options { via, ..Options::default() }).unwrap();
                let error = attempt.error.as_deref();
                assert_eq!(error, Some("EPERM"), "{when}, {via:?}: {attempt:?}");
            }
        }
    };
    eperm("nobody listens");
    let mut squatter = squat(&pod, port);
    eperm("a squatter listens");
    // It is there, and can be reached by whoever asks for it.
    let asked = Options { timeout_ms: 300, ..to_port("127.0.0.1", port, Imds::V1) };
    pod.ask_once(&asked).unwrap();
    let begun = Instant::now();
    let mut agent = lab.begin_agent(&[]);
    let opened = || agent.log().matches("Pod listener open").count();
    while opened() < PODS {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "{} of {PODS}: {}",
            opened(),
            agent.log()
        );
        thread::sleep(Duration::from_millis(1));
    }
    let took = begun.elapsed();
    println!("{PODS} pods have listeners again {took:?} after a new agent's start (goal: 1 s)");
    agent.serves();
    println!("it serves and is ready after {:?}", begun.elapsed());
    assert_eq!(inside(&lab), PODS);
    lab.assert_served(&pod, "orders");
    assert_ne!(port_inside(&lab, &pod), port, "{}", path_of(&lab, &pod));
    lab.assert_role(&further[0].credentials().unwrap(), "crowd");
    assert!(agent.verdicts("denied_listener") >= 12);
    assert_eq!(squatter.attempt(Attack::Caught, 1000).unwrap().body, "1");
}

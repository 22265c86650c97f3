//! The agent's listener and ports: nobody takes them from it, and nobody comes to it but by the kernel's hand.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use lab::{
    AGENT_PORT, LabPod, NODE_V4, PodSpec,
    pod_client::{Options, attack::Attack},
};

/// What comes of binding `port` of all addresses and of `own`: an error's name or `bound` for each way.
fn bind(pod: &LabPod, own: Ipv4Addr, port: u16) -> Vec<String> {
    let mut attacker = pod.attacker().unwrap();
    let (any4, any6) = (Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into());
    let addresses: [IpAddr; 4] = [any4, own.into(), any6, own.to_ipv6_mapped().into()];
    let ways = addresses.into_iter().flat_map(|address| [(address, false), (address, true)]);
    ways.map(|(address, reuse_port)| {
        let at = (address, port).into();
        let error = attacker.attempt(Attack::Bind { at, reuse_port }, 1000).unwrap().error;
        error.unwrap_or_else(|| "bound".to_owned())
    })
    .collect()
}

#[test]
fn pods_on_the_nodes_network_cant_bind_the_agents_ports_dead_or_alive() {
    let Some(lab) = lab::node_test!() else { return };
    let host_pod = lab.pod(PodSpec::new("kube-system", "cni").host_network()).unwrap();
    let pod = lab.pod(PodSpec::new("shop", "loki")).unwrap();
    let all = |what: &str| vec![what.to_owned(); 8];
    assert_eq!(bind(&host_pod, NODE_V4, AGENT_PORT), all("bound"), "no agent yet");
    let mut agent = lab.agent(&[]);
    for state in ["alive", "dead"] {
        for port in [AGENT_PORT, 3101] {
            assert_eq!(bind(&host_pod, NODE_V4, port), all("EPERM"), "{state}");
        }
        assert_eq!(bind(&host_pod, NODE_V4, 3102), all("bound"), "{state}");
        // In its own namespace a pod binds what it likes.
        assert_eq!(bind(&pod, Ipv4Addr::LOCALHOST, AGENT_PORT), all("bound"), "{state}");
        if state == "alive" {
            agent.kill().unwrap();
        }
    }
}

#[test]
fn who_listens_in_the_dead_agents_place_is_not_connected_to() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&["--host-network-pods=intercept"]);
    let spec = PodSpec::new("kube-system", "cni").role("cni").host_network();
    let pod = lab.pod(spec).unwrap();
    lab.assert_served(&pod, "cni");
    agent.kill().unwrap();
    // A process of the node's own takes the port, within the dead agent's lease.
    let squatter = lab.node.netns().listen(([10, 77, 0, 1], AGENT_PORT).into()).unwrap();
    squatter.set_nonblocking(true).unwrap();
    for _ in 0..3 {
        let attempt = pod.credentials().unwrap();
        assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{attempt:?}");
    }
    let accepted = squatter.accept().map(|(_, peer)| peer).map_err(|error| error.kind());
    assert_eq!(accepted.unwrap_err(), std::io::ErrorKind::WouldBlock);
    drop(squatter);
    let agent = lab.agent(&["--host-network-pods=intercept"]);
    lab.assert_served(&pod, "cni");
    let metrics = agent.metrics();
    let denied = "kiam_intercept_verdicts_total{verdict=\"denied_listener\"} 3";
    assert!(metrics.contains(denied), "{metrics}");
}

#[test]
fn syns_that_no_connect_has_sent_take_no_place_in_the_queue() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&[]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    // More than any accept queue holds, from the host, which no hook sees, while a pod works.
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| {
            let mut attacker = lab.node.attacker().unwrap();
            let to = (NODE_V4, AGENT_PORT).into();
            attacker.must(Attack::Hold { to, count: 4000 }).unwrap();
            std::thread::sleep(Duration::from_secs(2));
            attacker.attempt(Attack::Connected, 1000).unwrap().body
        });
        let asking = Options { for_ms: Some(1500), pause_ms: 5, ..Options::default() };
        for attempt in pod.ask(&asking).unwrap() {
            lab.assert_role(&attempt, "orders");
        }
        assert_eq!(flooding.join().unwrap(), "0");
    });
    let metrics = agent.metrics();
    let dropped = metrics.lines().find(|line| line.contains("dropped_syn")).unwrap();
    let count: u64 = dropped.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(count >= 4000, "{dropped}");
}

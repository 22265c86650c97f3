//! The agent's listener and ports: nobody takes them from it, and nobody comes to it but by the kernel's hand.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{path::Path, time::Duration};

use lab::{AGENT_PORT, Agent, Lab, PodSpec, pod_client::Options, role_arn};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
const READY_LIMIT: Duration = Duration::from_secs(120);

fn start(lab: &Lab, further: &[&str]) -> Agent {
    let mut agent = Agent::start(lab, Path::new(AGENT), further).unwrap();
    agent.wait_ready(READY_LIMIT).unwrap();
    agent
}

/// What comes of binding `address` and `port`, one name of an error or `bound` for each way.
fn bind_script(port: u16) -> String {
    format!(
        "import socket,errno\n\
         for family,address in ((socket.AF_INET,'0.0.0.0'),(socket.AF_INET,'10.77.0.1'),\
         (socket.AF_INET6,'::'),(socket.AF_INET6,'::ffff:10.77.0.1')):\n\
         \x20for reuse in (0,1):\n\
         \x20 s=socket.socket(family)\n\
         \x20 s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEPORT,reuse)\n\
         \x20 try: s.bind((address,{port}));print('bound',end=' ')\n\
         \x20 except OSError as e: print(errno.errorcode[e.errno],end=' ')\n\
         \x20 s.close()"
    )
}

#[test]
fn pods_on_the_nodes_network_cant_bind_the_agents_ports_dead_or_alive() {
    let Some(lab) = lab::node_test!() else { return };
    let host_pod = lab.pod(PodSpec::new("kube-system", "cni").host_network()).unwrap();
    let pod = lab.pod(PodSpec::new("shop", "loki")).unwrap();
    let all = |what: &str| [what; 8].join(" ");
    assert_eq!(host_pod.python(&bind_script(AGENT_PORT)).unwrap(), all("bound"), "no agent yet");
    let mut agent = start(&lab, &[]);
    for state in ["alive", "dead"] {
        for port in [AGENT_PORT, 3101] {
            assert_eq!(host_pod.python(&bind_script(port)).unwrap(), all("EPERM"), "{state}");
        }
        assert_eq!(host_pod.python(&bind_script(3102)).unwrap(), all("bound"), "{state}");
        // In its own namespace a pod binds what it likes.
        let own = bind_script(AGENT_PORT).replace("10.77.0.1", "127.0.0.1");
        assert_eq!(pod.python(&own).unwrap(), all("bound"), "{state}");
        if state == "alive" {
            agent.kill().unwrap();
        }
    }
}

#[test]
fn who_listens_in_the_dead_agents_place_is_not_connected_to() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = start(&lab, &["--host-network-pods=intercept"]);
    let spec = PodSpec::new("kube-system", "cni").role("cni").host_network();
    let pod = lab.pod(spec).unwrap();
    let attempt = pod.credentials().unwrap();
    assert_eq!(lab.role_of(&attempt), Some(role_arn("cni")), "{attempt:?}");
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
    let agent = start(&lab, &["--host-network-pods=intercept"]);
    let attempt = pod.credentials().unwrap();
    assert_eq!(lab.role_of(&attempt), Some(role_arn("cni")), "{attempt:?}");
    let metrics = agent.admin("/metrics").unwrap().body;
    let denied = "kiam_intercept_verdicts_total{verdict=\"denied_listener\"} 3";
    assert!(metrics.contains(denied), "{metrics}");
}

#[test]
fn syns_that_no_connect_has_sent_take_no_place_in_the_queue() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = start(&lab, &[]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    // More than any accept queue holds, from the host, which no hook sees, while a pod works.
    let flood = format!(
        "import socket,time\n\
         held=[]\n\
         for _ in range(4000):\n\
         \x20s=socket.socket();s.setblocking(False)\n\
         \x20try: s.connect(('10.77.0.1',{AGENT_PORT}))\n\
         \x20except BlockingIOError: pass\n\
         \x20held.append(s)\n\
         time.sleep(2)\n\
         connected=0\n\
         for s in held:\n\
         \x20try: s.getpeername();connected+=1\n\
         \x20except OSError: pass\n\
         print(connected)"
    );
    let flood =
        format!("import resource\nresource.setrlimit(resource.RLIMIT_NOFILE,(8192,8192))\n{flood}");
    std::thread::scope(|scope| {
        let flooding = scope.spawn(|| lab.node.python(&flood).unwrap());
        let asking = Options { for_ms: Some(1500), pause_ms: 5, ..Options::default() };
        for attempt in pod.ask(&asking).unwrap() {
            assert_eq!(lab.role_of(&attempt), Some(role_arn("orders")), "{attempt:?}");
        }
        assert_eq!(flooding.join().unwrap(), "0");
    });
    let metrics = agent.admin("/metrics").unwrap().body;
    let dropped = metrics.lines().find(|line| line.contains("dropped_syn")).unwrap();
    let count: u64 = dropped.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(count >= 4000, "{dropped}");
}

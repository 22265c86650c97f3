//! Who else comes to a listener inside a pod, or takes its place.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use lab::{
    Lab, LabPod,
    pod_client::{Attempt, Imds, Options, Via},
};
use tokio::time::Instant;

use super::{
    Agent, assert_served, begin, eventually, inside, many_pods, metric, path_of, pod_inside,
    port_inside, serves, start, verdicts,
};

/// Listens at a port of 127.0.0.1 and `::1`, says so, and prints whatever comes until its input ends.
const SQUAT: &str = "\
import socket,sys,threading
for family,host in ((socket.AF_INET,'127.0.0.1'),(socket.AF_INET6,'::1')):
 s=socket.socket(family)
 s.bind((host,int(sys.argv[1])))
 s.listen()
 def take(s=s):
  while True:
   print('caught',s.accept()[0].recv(4096),flush=True)
 threading.Thread(target=take,daemon=True).start()
print('listening',flush=True)
sys.stdin.read()
";

fn to_port(address: &str, port: u16, imds: Imds) -> Options {
    let to = Some(address.parse().unwrap());
    let path = "/latest/meta-data/iam/security-credentials/orders";
    Options { to, port, imds, ..Options::get(path) }
}

fn connections(agent: &Agent, identity: &str) -> u64 {
    metric(agent, &format!("kiam_serve_connections_total{{identity=\"{identity}\"}}"))
}

fn assert_forbidden(attempt: &Attempt, who: &str) {
    let got = (attempt.status, attempt.body.as_str(), attempt.error.as_deref());
    assert_eq!(got, (Some(403), "", None), "{who}: {attempt:?}");
}

#[test]
fn who_comes_to_the_listener_without_a_recorded_connect_is_refused() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = start(&lab, &[]);
    let pod = pod_inside(&lab, "orders");
    assert_served(&lab, &pod.credentials().unwrap(), "orders");
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
    let Some(lab) = lab::node_test!() else { return };
    let agent = start(&lab, &[]);
    let owner = pod_inside(&lab, "orders");
    let visitor = pod_inside(&lab, "reports");
    assert_served(&lab, &owner.credentials().unwrap(), "orders");
    let before = verdicts(&agent, "denied_namespace");
    for via in [Via::V4, Via::V4Mapped, Via::V6] {
        for imds in [Imds::V1, Imds::V2] {
            let asked = Options { via, imds, ..Options::default() };
            let attempt = visitor.ask_inside(owner.netns(), &asked).unwrap();
            assert_eq!(attempt.error.as_deref(), Some("EPERM"), "{attempt:?}");
        }
    }
    assert_eq!(verdicts(&agent, "denied_namespace") - before, 6);
    assert_served(&lab, &owner.credentials().unwrap(), "orders");
    assert_served(&lab, &visitor.credentials().unwrap(), "reports");
}

/// A process of a pod's that has taken a port.
struct Squatter {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

// === impl Squatter ===

impl Squatter {
    fn start(pod: &LabPod, port: u16) -> Self {
        let mut command = pod.command("python3").unwrap();
        command.args(["-c", SQUAT, &port.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "listening\n");
        Self { child, output }
    }

    /// What came to it.
    fn finish(mut self) -> Vec<String> {
        drop(self.child.stdin.take());
        let caught = self.output.lines().map(Result::unwrap).collect();
        self.child.wait().unwrap();
        caught
    }
}

#[test]
fn a_port_that_somebody_takes_after_a_crash_is_nobodys() {
    if lab::skip!() {
        return;
    }
    const PODS: usize = 250;
    let lab = Lab::start().unwrap();
    let mut agent = start(&lab, &[]);
    let pod = pod_inside(&lab, "orders");
    let further = many_pods(&lab, PODS - 1);
    eventually(|| inside(&lab) == PODS, || inside(&lab));
    assert_served(&lab, &pod.credentials().unwrap(), "orders");
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
    let squatter = Squatter::start(&pod, port);
    eperm("a squatter listens");
    // It is there, and can be reached by whoever asks for it.
    let asked = Options { timeout_ms: 300, ..to_port("127.0.0.1", port, Imds::V1) };
    pod.ask_once(&asked).unwrap();
    let begun = Instant::now();
    let mut agent = begin(&lab, &[]);
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
    serves(&mut agent);
    println!("it serves and is ready after {:?}", begun.elapsed());
    assert_eq!(inside(&lab), PODS);
    let attempt = pod.credentials().unwrap();
    assert_served(&lab, &attempt, "orders");
    assert_ne!(port_inside(&lab, &pod), port, "{}", path_of(&lab, &pod));
    assert_served(&lab, &further[0].credentials().unwrap(), "crowd");
    assert!(verdicts(&agent, "denied_listener") >= 12);
    let caught = squatter.finish();
    assert_eq!(caught.len(), 1, "{caught:?}");
}

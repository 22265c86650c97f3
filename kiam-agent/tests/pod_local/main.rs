//! The pod-local path on a lab node, with the whole agent: who can read it, who can block it, who else comes to the
//! listeners inside pods, and what becomes of them when agents and pods come and go.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod crowd;
mod paths;
mod secrets;
mod strangers;

use std::{os::unix::net::UnixStream, thread, time::Duration};

use kiam_agent::admin;
use lab::{
    Agent, Lab, LabPod, PodSpec,
    pod_client::{
        Attempt,
        wire::{Reply, exchange},
    },
    role_arn,
};
use serde_json::Value;
use tokio::time::Instant;

const LIMIT: Duration = Duration::from_secs(120);

/// Verdicts, as the metrics name them.
const INSIDE: &str = "redirected_inside";
const ON_THE_NODE: &str = "redirected";

/// A pod that has its listeners.
fn pod_inside(lab: &Lab, role: &str) -> LabPod {
    let pod = lab.pod_of(role);
    port_inside(lab, &pod);
    pod
}

fn is_served(lab: &Lab, attempt: &Attempt, role: &str) -> bool {
    attempt.status == Some(200) && lab.role_of(attempt) == Some(role_arn(role))
}

/// What the agent that serves answers on the socket that only the node's root can open.
fn operator(lab: &Lab, path: &str) -> Reply {
    let mut stream = UnixStream::connect(lab.state().join(admin::SOCKET)).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    exchange(&mut stream, &request).unwrap()
}

/// What it says of all pods.
fn pods(lab: &Lab) -> Vec<Value> {
    serde_json::from_str(&operator(lab, "/pods").body).unwrap()
}

/// What it says of one, and whether that would get credentials.
fn explain(lab: &Lab, pod: &str) -> (bool, String) {
    let answer = operator(lab, &format!("/explain/{pod}"));
    (answer.status == 200, answer.body)
}

/// How it says that the pod's connections go; empty while it does not know the pod.
fn path_of(lab: &Lab, pod: &LabPod) -> String {
    let pods = pods(lab);
    let found = pods.iter().find(|shown| shown["uid"] == pod.uid());
    found.map(|shown| shown["path"].as_str().unwrap().to_owned()).unwrap_or_default()
}

/// Waits until the pod has its listeners; their port.
fn port_inside(lab: &Lab, pod: &LabPod) -> u16 {
    let path = || path_of(lab, pod);
    eventually(|| port(&path()).is_some(), path);
    port(&path()).unwrap()
}

/// The port that `/pods` tells.
fn port(path: &str) -> Option<u16> {
    let text =
        path.strip_prefix("pod-local: listening on port ")?.strip_suffix(" inside the pod")?;
    text.parse().ok()
}

/// A counter of the agent's, such as `kiam_serve_connections_total{identity="NoEntry"}`; 0 before it is counted.
fn metric(agent: &Agent, name: &str) -> u64 {
    let metrics = agent.admin("/metrics").unwrap().body;
    let mut found = metrics.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.next().map_or(0, |value| value.parse().unwrap())
}

fn verdicts(agent: &Agent, verdict: &str) -> u64 {
    metric(agent, &format!("kiam_intercept_verdicts_total{{verdict=\"{verdict}\"}}"))
}

/// As many pods as a node has, made by a few threads.
fn many_pods(lab: &Lab, count: usize) -> Vec<LabPod> {
    thread::scope(|scope| {
        let parts: Vec<_> = (0..4)
            .map(|part| {
                let make = move |number: usize| {
                    let spec = PodSpec::new("crowd", &format!("pod-{number}")).role("crowd");
                    lab.pod(spec).unwrap()
                };
                scope.spawn(move || (part..count).step_by(4).map(make).collect::<Vec<_>>())
            })
            .collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    })
}

/// How many pods `/pods` says are inside.
fn inside(lab: &Lab) -> usize {
    let is_inside = |shown: &&Value| port(shown["path"].as_str().unwrap()).is_some();
    pods(lab).iter().filter(is_inside).count()
}

/// Waits until `true_at_last` is; `shown` tells what it was instead.
fn eventually<T: std::fmt::Debug>(true_at_last: impl Fn() -> bool, shown: impl Fn() -> T) {
    let started = Instant::now();
    while !true_at_last() {
        assert!(started.elapsed() < LIMIT, "after {LIMIT:?} it is {:?}", shown());
        thread::sleep(Duration::from_millis(20));
    }
}

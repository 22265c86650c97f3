//! The pod-local path on a lab node, with the whole agent: who can read it, who can block it, who else comes to the
//! listeners inside pods, and what becomes of them when agents and pods come and go.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod crowd;
mod paths;
mod secrets;
mod strangers;

use std::thread;

use lab::{Lab, LabPod, PodSpec, eventually, pod_client::Attempt, role_arn};
use serde_json::Value;

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

/// What the agent says of a pod, and whether that would get credentials.
fn explain(lab: &Lab, pod: &str) -> (bool, String) {
    let answer = lab.operator(&format!("/explain/{pod}")).unwrap();
    (answer.status == 200, answer.body)
}

/// How it says that the pod's connections go; empty while it does not know the pod.
fn path_of(lab: &Lab, pod: &LabPod) -> String {
    let pods = lab.shown_pods();
    let found = pods.iter().find(|shown| shown["uid"] == pod.uid());
    found.map(|shown| shown["path"].as_str().unwrap().to_owned()).unwrap_or_default()
}

/// Waits until the pod has its listeners; their port.
fn port_inside(lab: &Lab, pod: &LabPod) -> u16 {
    eventually("it has a listener", || port(&path_of(lab, pod)).is_some());
    port(&path_of(lab, pod)).unwrap()
}

/// The port that `/pods` tells.
fn port(path: &str) -> Option<u16> {
    let text =
        path.strip_prefix("pod-local: listening on port ")?.strip_suffix(" inside the pod")?;
    text.parse().ok()
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
    lab.shown_pods().iter().filter(is_inside).count()
}

//! The audit on a lab node, with the whole agent: which process got which access key, as adversaries would have it otherwise.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod join;
mod names;
mod writing;

use std::{fs, path::Path, process::Stdio};

use lab::{Lab, LabPod, eventually, pod_client::Attempt};
use serde_json::Value;

/// The audit's lines in a text that has others too.
fn lines(text: &str) -> Vec<Value> {
    let lines = text.lines().filter(|line| line.starts_with("{\"audit\""));
    lines.map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
}

/// The lines about `pod`.
fn of_pod(lines: &[Value], pod: &LabPod) -> Vec<Value> {
    lines.iter().filter(|line| line["pod"]["uid"] == pod.uid()).cloned().collect()
}

/// The first line about `pod`, once there is one.
fn line_of(log: impl Fn() -> String, pod: &LabPod) -> Value {
    eventually("the audit has a line of the pod", || !of_pod(&lines(&log()), pod).is_empty());
    of_pod(&lines(&log()), pod).remove(0)
}

/// What the lines of `pod` count.
fn counted(lines: &[Value], pod: &LabPod) -> u64 {
    of_pod(lines, pod).iter().map(|line| line["count"].as_u64().unwrap()).sum()
}

fn key_of(attempt: &Attempt) -> String {
    assert_eq!(attempt.status, Some(200), "{attempt:?}");
    attempt.field("AccessKeyId").unwrap()
}

/// A request for credentials of `role` by IMDSv1, with further headers.
fn request(role: &str, headers: &str) -> String {
    let path = format!("/latest/meta-data/iam/security-credentials/{role}");
    format!(
        "GET {path} HTTP/1.1\\r\\nHost: 169.254.169.254\\r\\n{headers}Connection: close\\r\\n\\r\\n"
    )
}

/// Runs `script` in the pod by bash, and returns what it printed.
fn run(pod: &LabPod, script: &str) -> String {
    let mut command = pod.command("bash").unwrap();
    let output = command.args(["-c", script]).stdin(Stdio::null()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A pod with a role that is served inside its own namespace.
fn served(lab: &Lab, role: &str) -> LabPod {
    let pod = lab.pod_of(role);
    lab.assert_served(&pod, role);
    pod
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

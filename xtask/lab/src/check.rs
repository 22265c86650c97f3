//! What tests ask of a lab again and again.

use std::{fmt::Debug, os::unix::net::UnixStream, thread, time::Duration};

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::time::Instant;

use super::{
    agent::Agent,
    loopback::LoopbackNode,
    netns::tells_namespaces_apart,
    pod::LabPod,
    world::{Lab, role_arn},
};
use crate::pod_client::{
    Attempt,
    wire::{Reply, exchange},
};

/// Nothing that a test waits for takes so long but a mistake, on a slow machine too.
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);
/// Attempts of a pod that has just come: those of an SDK, and more only on a machine that is very busy.
const EARLY: u64 = 40;

/// Waits until `holds`.
///
/// # Panics
///
/// When it does not within two minutes.
#[track_caller]
pub fn eventually(what: &str, holds: impl FnMut() -> bool) {
    eventually_is(what, &true, holds);
}

/// Waits until `look` sees what is `expected`. Panics when it does not within two minutes.
#[track_caller]
pub fn eventually_is<T: PartialEq + Debug>(what: &str, expected: &T, mut look: impl FnMut() -> T) {
    let begun = Instant::now();
    loop {
        let seen = look();
        if seen == *expected {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "never came: {what}: {seen:?} instead of {expected:?}");
        thread::sleep(POLL);
    }
}

/// A counter or gauge of these metrics, such as `kiam_serve_connections_total{identity="NoEntry"}`.
fn metric(metrics: &str, name: &str) -> Option<u64> {
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(value.parse().expect("a metric is a whole number"))
}

/// Whether the pod has to ask again because nobody knows yet which pod its network namespace or its address is of.
fn is_too_early(attempt: &Attempt) -> bool {
    if tells_namespaces_apart().expect("a socket can be asked") {
        return attempt.error.as_deref() == Some("EPERM");
    }
    attempt.status == Some(403) && attempt.reason() == "the source address is not the pod's"
}

impl Agent {
    /// Its metrics. Panics when it does not answer.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.admin("/metrics").expect("the agent answers its operators").body
    }

    /// A counter or gauge; 0 before it is counted.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        metric(&self.metrics(), name).unwrap_or(0)
    }

    /// How often its kernel programs have come to this verdict.
    #[must_use]
    pub fn verdicts(&self, verdict: &str) -> u64 {
        self.metric(&format!("kiam_intercept_verdicts_total{{verdict=\"{verdict}\"}}"))
    }
}

impl LoopbackNode {
    /// A counter or gauge of the agent's; 0 before it is counted.
    #[must_use]
    pub fn metric(&self, name: &str) -> u64 {
        metric(&self.metrics(), name).unwrap_or(0)
    }
}

impl Lab {
    /// Asserts that the attempt got credentials that STS issued for `role`.
    ///
    /// # Panics
    ///
    /// When it did not.
    #[track_caller]
    pub fn assert_role(&self, attempt: &Attempt, role: &str) {
        assert_eq!(attempt.status, Some(200), "{attempt:?}");
        assert_eq!(self.role_of(attempt), Some(role_arn(role)), "{attempt:?}");
    }

    /// Asserts that `pod` gets credentials that STS issued for `role`.
    ///
    /// # Panics
    ///
    /// When it does not.
    #[track_caller]
    pub fn assert_served(&self, pod: &LabPod, role: &str) {
        let attempt = pod.credentials().expect("the client in the pod runs");
        self.assert_role(&attempt, role);
    }

    /// Asks in a pod that has just come, as often as the kernel denies its connect because no agent knows its network namespace
    /// yet, or, below kernel 5.14, the agent rejects it because it does not know its address yet; how often that was.
    /// docs/first-connects.md says how rare the first is.
    ///
    /// # Panics
    ///
    /// When it gets no credentials that STS issued for `role`, or something else fails.
    #[track_caller]
    pub fn first_served(&self, pod: &LabPod, role: &str) -> u64 {
        let mut denied = 0;
        loop {
            let attempt = pod.credentials().expect("the client in the pod runs");
            if !is_too_early(&attempt) {
                self.assert_role(&attempt, role);
                return denied;
            }
            denied += 1;
            assert!(denied < EARLY, "a pod is denied in {EARLY} attempts");
            thread::sleep(POLL);
        }
    }

    /// Asserts that nothing of the pods has come to the real metadata service.
    ///
    /// # Panics
    ///
    /// When something has.
    #[track_caller]
    pub fn assert_no_packets(&self, pods: &[&LabPod]) {
        let packets = self.imds.packets();
        for address in pods.iter().flat_map(|pod| pod.ips()) {
            assert_eq!(
                packets.get(&address),
                None,
                "packets of {address} got to IMDS: {packets:?}"
            );
        }
    }

    /// A pod that has been served: of the namespace `shop`, named like its role.
    #[track_caller]
    #[must_use]
    pub fn served_pod(&self, role: &str) -> LabPod {
        let pod = self.pod_of(role);
        self.assert_served(&pod, role);
        pod
    }

    /// Waits until `pod` gets credentials, and asserts that they are of `role`.
    #[track_caller]
    pub fn eventually_served(&self, pod: &LabPod, role: &str) {
        let served = || pod.credentials().is_ok_and(|attempt| attempt.status == Some(200));
        eventually("credentials", served);
        self.assert_served(pod, role);
    }

    /// What the agent that serves answers on the socket that only the node's root can open.
    pub fn operator(&self, path: &str) -> Result<Reply> {
        let stream = UnixStream::connect(self.state().join("admin.sock"));
        let mut stream = stream.context("connecting to the agent's admin socket")?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        exchange(&mut stream, &request).with_context(|| format!("asking for {path}"))
    }

    /// What `/pods` says of all pods; nothing while no agent answers.
    #[must_use]
    pub fn shown_pods(&self) -> Vec<Value> {
        let Ok(reply) = self.operator("/pods") else { return Vec::new() };
        serde_json::from_str(&reply.body).expect("/pods is a list")
    }
}

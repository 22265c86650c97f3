//! What tests ask of a lab again and again.

use std::{thread, time::Duration};

use tokio::time::Instant;

use super::{
    pod::LabPod,
    world::{Lab, role_arn},
};
use crate::pod_client::Attempt;

/// Nothing that a test waits for takes so long but a mistake, on a slow machine too.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Waits until `holds`.
///
/// # Panics
///
/// When it does not within a minute.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LIMIT, "never came: {what}");
        thread::sleep(POLL);
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
}

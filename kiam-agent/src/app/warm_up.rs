//! What has to be there before the first pod is answered.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::listeners::trusted;
use crate::{config::Config, handover};
use kiam_core::{credentials::CredentialReader, lifecycle::Readiness};

/// How long the start waits for pods and first credentials before it serves without them: a node whose
/// API server or STS is away must still refuse in an orderly way.
const FIRST_PASS: Duration = Duration::from_secs(10);
/// How long single roles that STS does not give may keep an agent from relieving the one that serves, which
/// may hold them.
const STRAGGLERS: Duration = Duration::from_secs(300);
/// How often it is asked after that whether the other agent goes on.
const AGAIN: Duration = Duration::from_secs(1);
const NAMES: [&str; 4] = ["pods", "namespaces", "service accounts", "first credentials"];

/// Waits until everything is there, and for a while at most; but for as long as it takes while another agent
/// serves and does not end: that one has what this one lacks.
pub(super) async fn warm_up(
    readiness: &Readiness,
    credentials: &CredentialReader,
    config: &Config,
) {
    let began = Instant::now();
    let mut warned = false;
    let mut patience = FIRST_PASS;
    loop {
        let passed = timeout(patience, complete(readiness, &NAMES)).await.is_ok();
        let held = credentials.summary();
        let lacks = held.retried > 0 && (held.ready == 0 || began.elapsed() < STRAGGLERS);
        if passed && !lacks {
            return;
        }
        if !handover::is_served(&config.state_dir, &trusted(config)).await {
            break;
        }
        if !warned {
            let pending = readiness.pending();
            warn!(?pending, roles = held.retried, "Not taking over before everything is there");
            warned = true;
        }
        patience = AGAIN;
        if passed {
            sleep(AGAIN).await;
        }
    }
    warn!(pending = ?readiness.pending(), "Serving before everything is there");
}

/// Waits until everything is there, and for a while at most: nobody serves before.
pub(super) async fn first_pass(readiness: &Readiness) {
    if timeout(FIRST_PASS, complete(readiness, &NAMES)).await.is_err() {
        warn!(pending = ?readiness.pending(), "Serving before everything is there");
    }
}

/// Waits until what has these names is there.
pub(super) async fn complete(readiness: &Readiness, names: &[&'static str]) {
    while readiness.pending().iter().any(|name| names.contains(name)) {
        sleep(Duration::from_millis(5)).await;
    }
}

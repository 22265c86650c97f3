//! Waits for what must be known before pods are served.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use super::Peers;
use kiam_core::{
    credentials::CredentialReader,
    lifecycle::{Latch, Readiness},
};

/// How long the start waits for pods, and beside another agent for first credentials, before it serves without them: a node
/// whose API server or STS is away must still be denied in an orderly way.
const FIRST_PASS: Duration = Duration::from_secs(10);
/// How long single roles that STS does not issue may keep an agent from superseding the one that serves, which may have
/// them cached.
const STRAGGLERS: Duration = Duration::from_secs(300);
/// How often, after that, it is checked whether the other agent goes on.
const AGAIN: Duration = Duration::from_secs(1);

/// The conditions to be met before pods are served: what the cluster's objects are and, beside another agent, the credentials
/// that they ask for.
pub struct FirstPass {
    /// That the cluster's objects are known.
    pub known: Vec<Latch>,
    /// That each pod's credentials have come, or will not.
    pub first_credentials: Latch,
    /// Where all of these are shown.
    pub readiness: Readiness,
    /// The credentials that have come.
    pub credentials: CredentialReader,
}

// === impl FirstPass ===

impl FirstPass {
    /// Waits until all conditions are met, for a while at most; but for as long as it takes while another agent serves and
    /// does not end, for that one has what this one lacks.
    pub async fn warm_up(&self, peers: &Peers) {
        let began = Instant::now();
        let mut conditions = self.known.clone();
        conditions.push(self.first_credentials.clone());
        let mut warned = false;
        let mut patience = FIRST_PASS;
        loop {
            let passed = timeout(patience, self.readiness.wait_for(&conditions)).await.is_ok();
            let cached = self.credentials.summary();
            let lacks = cached.retried > 0 && (cached.ready == 0 || began.elapsed() < STRAGGLERS);
            if passed && !lacks {
                return;
            }
            if !peers.is_served().await {
                break;
            }
            if !warned {
                let pending = self.readiness.pending();
                warn!(
                    ?pending,
                    roles = cached.retried,
                    "Not taking over before pods and credentials are known"
                );
                warned = true;
            }
            patience = AGAIN;
            if passed {
                sleep(AGAIN).await;
            }
        }
        self.warn_of_pending();
    }

    /// Waits until pods are known, for a while at most: nobody serves before. Each pod's request waits for its own
    /// credentials.
    pub async fn finish(&self) {
        if timeout(FIRST_PASS, self.readiness.wait_for(&self.known)).await.is_err() {
            self.warn_of_pending();
        }
    }

    fn warn_of_pending(&self) {
        let pending = self.readiness.pending();
        warn!(?pending, "Serving before pods and credentials are known");
    }
}

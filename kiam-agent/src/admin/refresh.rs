//! `kiam-agent refresh`: asks STS for a pod's credentials now, and reports the outcome.

use std::time::Duration;

use kiam_core::{
    credentials::{CredentialReader, RefreshError, Refresher, State},
    pods::PodReader,
    policy::{Decision, RolePolicy},
};

/// Less than the listener gives a connection, and more than a call to STS takes.
const DEADLINE: Duration = Duration::from_secs(20);

/// Refreshes the credentials of single pods. Cheap to clone.
#[derive(Clone)]
pub struct PodRefresher {
    /// The pods that are known.
    pub pods: PodReader,
    /// Which role each may have.
    pub policy: RolePolicy,
    /// Cached credentials.
    pub credentials: CredentialReader,
    /// What asks STS.
    pub refresher: Refresher,
}

// === impl PodRefresher ===

impl PodRefresher {
    /// The outcome for the pod of this name; `None` if no pod of this name may have a role.
    pub(super) async fn refresh(
        &self,
        namespace: &str,
        name: &str,
    ) -> Option<Result<String, String>> {
        let pods = self.pods.all();
        let pod =
            pods.iter().find(|pod| pod.live && pod.namespace == namespace && pod.name == name)?;
        let Decision::Allow(identity) = self.policy.decide(pod) else { return None };
        let role = identity.role.clone();
        let error = match self.refresher.refresh(identity.as_ref().clone(), DEADLINE).await {
            Ok(()) => return Some(Ok(format!("AWS issued credentials of {role}\n"))),
            Err(error) => error,
        };
        let state = self.credentials.get(&identity);
        let text = match (&error, &state) {
            (RefreshError::Unanswered(_), Some(State::Pending(Some(limit)))) => {
                format!("no credentials of {role}: {error}: {limit}\n")
            }
            _ => format!("no credentials of {role}: {error}\n"),
        };
        Some(match state {
            Some(State::Ready(_)) => Err(format!("{text}the cached credentials are still valid\n")),
            _ => Err(text),
        })
    }
}

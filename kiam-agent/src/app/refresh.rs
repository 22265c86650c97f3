//! `kiam-agent refresh`: asks STS for a pod's credentials now, and says what came of it.

use std::time::Duration;

use super::knowledge::Knowledge;
use kiam_core::{
    credentials::{RefreshError, State},
    policy::Decision,
};

/// Less than the listener gives a connection, and more than a call to STS takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// What came of it, for each pod of this name; `None` where none may have a role, which [`super::explanation`] explains.
pub(super) async fn refresh(
    knowledge: &Knowledge,
    namespace: &str,
    name: &str,
) -> Option<Result<String, String>> {
    let pods = knowledge.pods.all();
    let pod = pods.iter().find(|pod| pod.live && pod.namespace == namespace && pod.name == name)?;
    let Decision::Allow(identity) = knowledge.policy.decide(pod) else { return None };
    let role = identity.role.clone();
    let refreshed = knowledge.refresher.refresh(identity.clone(), PATIENCE).await;
    let error = match refreshed {
        Ok(()) => return Some(Ok(format!("AWS issued credentials of {role}\n"))),
        Err(error) => error,
    };
    let state = knowledge.credentials.get(&identity);
    let text = match (&error, &state) {
        (RefreshError::Unanswered(_), Some(State::Pending(Some(limit)))) => {
            format!("no credentials of {role}: {error}: {limit}\n")
        }
        _ => format!("no credentials of {role}: {error}\n"),
    };
    Some(match state {
        Some(State::Ready(_)) => Err(format!("{text}those that it has are still good\n")),
        _ => Err(text),
    })
}

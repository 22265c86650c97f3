//! The credentials for a request, and whether they were cached when the pod asked for the first time.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use prometheus_client::encoding::EncodeLabelValue;
use tokio::time::Instant;

use super::Error;
use kiam_core::{
    credentials::{ErrorClass, IssuedCredentials, State},
    maps::RequestSet,
    pods::{Pod, PodReader, PodUid},
};

/// The `Retry-After` of pending credentials.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Pods that are remembered beyond twice the number of known pods, although they may be gone.
const GONE: usize = 64;

/// The outcome of a pod's first request for credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(super) enum FirstRequestOutcome {
    /// The credentials were cached.
    Ready,
    /// The credentials came within the hold.
    Waited,
    /// The credentials did not come within the hold.
    Failed,
}

/// The pods that have requested credentials before.
#[derive(Default)]
pub(super) struct FirstRequests(RwLock<RequestSet<PodUid>>);

/// The credentials of `state`, or the error for the client.
///
/// # Errors
///
/// [`Error::Denied`] and [`Error::NoCredentials`].
pub fn ready(state: Option<State>) -> Result<Arc<IssuedCredentials>, Error> {
    let reason = State::lack(state.as_ref()).unwrap_or_default();
    let retry_after = match state {
        Some(State::Ready(issued)) => return Ok(issued),
        Some(State::Failed { error, .. }) if error.class == ErrorClass::Denied => {
            return Err(Error::Denied { reason });
        }
        Some(State::Failed { retry_at, .. }) => retry_at.saturating_duration_since(Instant::now()),
        Some(State::Pending(_)) | None => RETRY_AFTER,
    };
    Err(Error::NoCredentials { reason, retry_after })
}

// === impl FirstRequestOutcome ===

impl FirstRequestOutcome {
    /// The outcome of a request that `waited` or not, and ended with credentials if `ready`.
    pub(super) fn of(waited: bool, ready: bool) -> Self {
        match (waited, ready) {
            (false, true) => Self::Ready,
            (true, true) => Self::Waited,
            (_, false) => Self::Failed,
        }
    }
}

// === impl FirstRequests ===

impl FirstRequests {
    /// Whether this is the first request of the pod `uid`. Pods that `pods` does not know any more are forgotten.
    pub(super) fn is_first(&self, uid: &PodUid, pods: &PodReader) -> bool {
        if self.0.read().unwrap_or_else(PoisonError::into_inner).contains(uid) {
            return false;
        }
        let mut asked = self.0.write().unwrap_or_else(PoisonError::into_inner);
        // So rarely that it costs a request next to nothing.
        if asked.len() >= 2 * pods.count::<Pod>() + GONE {
            asked.retain(|uid| pods.by_uid(uid).is_ok());
        }
        asked.insert(uid.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::pods::PodIndex;

    #[test]
    fn each_pod_asks_once_for_the_first_time_and_is_forgotten_with_its_record() {
        let (index, reader) = PodIndex::new();
        let first = FirstRequests::default();
        for _ in 0..3 {
            for n in 0..200 {
                let pod = Pod::test(n);
                index.apply(pod.clone());
                assert!(first.is_first(&pod.uid, &reader));
                assert!(!first.is_first(&pod.uid, &reader));
                index.delete(&pod);
            }
            assert!(first.0.read().unwrap().len() <= GONE + 2);
        }
    }
}

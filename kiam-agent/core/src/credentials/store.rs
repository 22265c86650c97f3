//! The credential cache, and its reader.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use zeroize::Zeroizing;

use super::{ErrorClass, IssuedCredentials, Limit, SourceError, State, inheritance};
use crate::{clock::Clock, maps::RequestMap, role::RoleIdentity};

/// One identity's entry. The prefetcher alone writes it.
#[derive(Default)]
pub(super) struct Entry {
    pub(super) issued: Option<Arc<IssuedCredentials>>,
    pub(super) failure: Option<(Arc<SourceError>, Instant)>,
    /// Why the call that is due has to wait.
    pub(super) limit: Option<Limit>,
}

pub(super) type Entries = RequestMap<RoleIdentity, Entry>;

/// A reader of the credential cache; cheap to clone. It never calls STS.
#[derive(Clone)]
pub struct CredentialReader {
    entries: watch::Receiver<Entries>,
    held_requests: HeldRequests,
    clock: Clock,
}

/// The number of requests that wait for each identity. Connections bound it.
#[derive(Clone, Default)]
pub(super) struct HeldRequests(Arc<Mutex<HashMap<RoleIdentity, usize>>>);

/// A request that waits; dropped, it is counted no more.
struct HeldRequest<'a> {
    all: &'a HeldRequests,
    identity: &'a RoleIdentity,
}

/// The number of identities in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Cached and valid.
    pub ready: usize,
    /// Requested, without an answer so far.
    pub pending: usize,
    /// Failed, with nothing valid in the cache.
    pub failed: usize,
    /// The failed ones that were not denied: a retry may succeed.
    pub retried: usize,
    /// The ready ones that should have been renewed long ago, by what the last attempt met.
    pub overdue: Overdue,
}

/// Cached credentials of which less than a quarter of their life is left: no renewal has succeeded, though the first was due
/// by 60 % of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overdue {
    /// AWS, or the Kubernetes API, denies the role: its owner's to repair.
    pub denied: usize,
    /// STS throttles the account whose quota the call counts for.
    pub throttled: usize,
    /// Any other failure, or no attempt yet.
    pub unanswered: usize,
}

// === impl CredentialReader ===

impl CredentialReader {
    pub(super) fn new(
        entries: watch::Receiver<Entries>,
        held_requests: HeldRequests,
        clock: Clock,
    ) -> Self {
        Self { entries, held_requests, clock }
    }

    /// The state of `identity` now; `None` when no pod wants it. Expired credentials are never returned.
    #[must_use]
    pub fn get(&self, identity: &RoleIdentity) -> Option<State> {
        self.entries.borrow().get(identity).map(|entry| self.state(entry))
    }

    /// As [`CredentialReader::get`], but waits up to `hold` for an identity that is pending or not wanted yet.
    pub async fn wait(&self, identity: &RoleIdentity, hold: Duration) -> Option<State> {
        let _held = self.held_requests.enter(identity);
        let mut entries = self.entries.clone();
        let settled = entries.wait_for(|entries| {
            let state = entries.get(identity).map(|entry| self.state(entry));
            matches!(state, Some(State::Ready(_) | State::Failed { .. }))
        });
        // Settled or timed out, the current state is the answer.
        let _ = timeout(hold, settled).await;
        self.get(identity)
    }

    /// Every identity that pods want, with its state now.
    #[must_use]
    pub fn all(&self) -> Vec<(RoleIdentity, State)> {
        let entries = self.entries.borrow();
        entries.iter().map(|(identity, entry)| (identity.clone(), self.state(entry))).collect()
    }

    /// All valid credentials, serialized for [`super::Inheritance`] in another process. All of the bytes are secret.
    #[must_use]
    pub fn bequeath(&self) -> Zeroizing<Vec<u8>> {
        let (wall, now) = (self.clock.now(), Instant::now());
        let entries = self.entries.borrow();
        inheritance::write(entries.iter().filter_map(|(identity, entry)| {
            let held = entry.issued.as_deref()?;
            (!held.term.left(wall, now).is_zero()).then_some((identity, held))
        }))
    }

    /// The number of identities in each state.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        let (wall, now) = (self.clock.now(), Instant::now());
        for entry in self.entries.borrow().values() {
            match self.state(entry) {
                State::Ready(issued) => {
                    summary.ready += 1;
                    if issued.term.is_overdue(wall, now) {
                        summary.overdue.count(entry.failure.as_ref().map(|(error, _)| error.class));
                    }
                }
                State::Pending(_) => summary.pending += 1,
                State::Failed { error, .. } => {
                    summary.failed += 1;
                    summary.retried += usize::from(error.class != ErrorClass::Denied);
                }
            }
        }
        summary
    }

    fn state(&self, entry: &Entry) -> State {
        let (wall, now) = (self.clock.now(), Instant::now());
        let valid = entry.issued.as_ref().filter(|held| !held.term.left(wall, now).is_zero());
        match (valid, &entry.failure) {
            (Some(issued), _) => State::Ready(issued.clone()),
            // Whatever failed before, this is why there is no retry.
            (None, _) if entry.limit == Some(Limit::Stale) => State::Pending(entry.limit),
            (None, Some((error, retry_at))) => {
                State::Failed { error: error.clone(), retry_at: *retry_at }
            }
            (None, None) => State::Pending(entry.limit),
        }
    }
}

// === impl Overdue ===

impl Overdue {
    fn count(&mut self, failure: Option<ErrorClass>) {
        *match failure {
            Some(ErrorClass::Denied | ErrorClass::Refused) => &mut self.denied,
            Some(ErrorClass::Throttled) => &mut self.throttled,
            Some(ErrorClass::Retryable | ErrorClass::TooLong) | None => &mut self.unanswered,
        } += 1;
    }
}

// === impl HeldRequests ===

impl HeldRequests {
    /// Whether a request waits for `identity`.
    pub(super) fn has(&self, identity: &RoleIdentity) -> bool {
        self.counts().contains_key(identity)
    }

    fn enter<'a>(&'a self, identity: &'a RoleIdentity) -> HeldRequest<'a> {
        *self.counts().entry(identity.clone()).or_default() += 1;
        HeldRequest { all: self, identity }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<RoleIdentity, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for HeldRequest<'_> {
    fn drop(&mut self) {
        let mut counts = self.all.counts();
        if let Some(count) = counts.get_mut(self.identity) {
            *count -= 1;
            if *count == 0 {
                counts.remove(self.identity);
            }
        }
    }
}

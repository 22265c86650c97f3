//! What is held, and the readers' side of it.

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
use crate::{clock::Clock, role::RoleIdentity};

/// One identity's entry. The prefetcher alone writes it.
#[derive(Default)]
pub(super) struct Entry {
    pub(super) issued: Option<Arc<IssuedCredentials>>,
    pub(super) failure: Option<(Arc<SourceError>, Instant)>,
    /// Why it is not asked for although it is due.
    pub(super) limit: Option<Limit>,
}

pub(super) type Entries = HashMap<RoleIdentity, Entry>;

/// Reads what is held; cheap to clone. It never asks STS.
#[derive(Clone)]
pub struct CredentialReader {
    entries: watch::Receiver<Entries>,
    held_requests: HeldRequests,
    clock: Clock,
}

/// How many requests are held for what. There are only as many as there may be connections.
#[derive(Clone, Default)]
pub(super) struct HeldRequests(Arc<Mutex<HashMap<RoleIdentity, usize>>>);

/// One held request, for as long as it is.
struct HeldRequest<'a> {
    all: &'a HeldRequests,
    identity: &'a RoleIdentity,
}

/// How many identities stand where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Held and valid.
    pub ready: usize,
    /// Asked for, not there yet.
    pub pending: usize,
    /// Failed, nothing valid held.
    pub failed: usize,
    /// Of the failed ones, those that were not denied: STS may give them yet.
    pub retried: usize,
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

    /// Where `identity` stands now; `None` when nobody wants it. What has expired is never returned.
    #[must_use]
    pub fn get(&self, identity: &RoleIdentity) -> Option<State> {
        self.entries.borrow().get(identity).map(|entry| self.state(entry))
    }

    /// As [`CredentialReader::get`], but what is pending, or not wanted yet, is waited for, up to `hold`.
    pub async fn wait(&self, identity: &RoleIdentity, hold: Duration) -> Option<State> {
        let _held = self.held_requests.enter(identity);
        let mut entries = self.entries.clone();
        let settled = entries.wait_for(|entries| {
            let state = entries.get(identity).map(|entry| self.state(entry));
            matches!(state, Some(State::Ready(_) | State::Failed { .. }))
        });
        // Whether it settled or the hold is over, what stands now is the answer.
        let _ = timeout(hold, settled).await;
        self.get(identity)
    }

    /// All that is held, for [`super::Inheritance`] in another process; all of it is secret.
    #[must_use]
    pub fn bequeath(&self) -> Zeroizing<Vec<u8>> {
        let (wall, now) = (self.clock.now(), Instant::now());
        let entries = self.entries.borrow();
        inheritance::write(entries.iter().filter_map(|(identity, entry)| {
            let held = entry.issued.as_deref()?;
            (!held.term.left(wall, now).is_zero()).then_some((identity, held))
        }))
    }

    /// How many stand where.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for entry in self.entries.borrow().values() {
            match self.state(entry) {
                State::Ready(_) => summary.ready += 1,
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
            // Whatever failed before, this is why it is not tried again.
            (None, _) if entry.limit == Some(Limit::Stale) => State::Pending(entry.limit),
            (None, Some((error, retry_at))) => {
                State::Failed { error: error.clone(), retry_at: *retry_at }
            }
            (None, None) => State::Pending(entry.limit),
        }
    }
}

// === impl HeldRequests ===

impl HeldRequests {
    /// Whether there are any for `identity`.
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

//! Fetching what is wanted before it is asked for, and keeping it fresh.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{Instant, sleep},
};
use tracing::{info, warn};

use super::{
    CredentialReader, CredentialSource, Credentials, ErrorClass, Issued, Metrics, Render,
    SourceError, schedule,
    store::{Entries, Entry},
};
use crate::{
    clock::Clock,
    lifecycle::{Drain, Latch},
    role::{RoleIdentity, WantedRoles},
};

/// Calls to STS in flight at once.
const IN_FLIGHT: usize = 16;

/// What nobody wants any more is kept for this long: a pod's successor often comes at once.
const LINGER: Duration = Duration::from_secs(60);

/// The schedule is looked at again at least this often: the wall clock may step.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// Keeps the wanted identities' credentials; [`Prefetcher::run`] is its task.
pub struct Prefetcher {
    source: Arc<dyn CredentialSource>,
    render: Render,
    clock: Clock,
    wanted: watch::Receiver<WantedRoles>,
    entries: watch::Sender<Entries>,
    plans: HashMap<RoleIdentity, Plan>,
    calls: JoinSet<(RoleIdentity, Result<Credentials, SourceError>)>,
    slots: Arc<Semaphore>,
    metrics: Metrics,
    first_pass: Latch,
}

/// What is to happen to one identity.
#[derive(Default)]
struct Plan {
    in_flight: bool,
    failures: u32,
    /// By tokio's clock, which no step moves.
    not_before: Option<Instant>,
    unwanted_since: Option<Instant>,
}

// === impl Prefetcher ===

impl Prefetcher {
    /// A prefetcher and the reader of what it holds. `first_pass` is set once every identity of the first
    /// set that was wanted has been answered, well or badly.
    #[must_use]
    pub fn new(
        source: Arc<dyn CredentialSource>,
        render: Render,
        clock: Clock,
        wanted: watch::Receiver<WantedRoles>,
        (metrics, first_pass): (Metrics, Latch),
    ) -> (Self, CredentialReader) {
        let entries = watch::Sender::new(Entries::new());
        let reader = CredentialReader::new(entries.subscribe(), clock.clone());
        let prefetcher = Self {
            source,
            render,
            clock,
            wanted,
            entries,
            plans: HashMap::new(),
            calls: JoinSet::new(),
            slots: Arc::new(Semaphore::new(IN_FLIGHT)),
            metrics,
            first_pass,
        };
        (prefetcher, reader)
    }

    /// Works until the drain begins. Calls in flight are then given up: nobody waits for them.
    pub async fn run(mut self, mut drain: Drain) {
        loop {
            let next = self.step();
            tokio::select! {
                Ok(()) = self.wanted.changed() => {}
                Some(done) = self.calls.join_next() => {
                    // A call that panicked is lost to its key for a while, not to the others.
                    if let Ok((identity, result)) = done {
                        self.settle(identity, result);
                    }
                }
                () = sleep(next) => {}
                () = drain.started() => return,
            }
        }
    }

    /// Compares what is wanted with what is held, starts what is due, and says when to look again.
    fn step(&mut self) -> Duration {
        let wanted = self.wanted.borrow_and_update().clone();
        self.follow(&wanted);
        let mut next = LOOK_AGAIN;
        let now = Instant::now();
        let mut unanswered = false;
        for identity in wanted.keys() {
            let due = self.due(identity, now);
            unanswered |= self.unanswered(identity);
            let Some(plan) = self.plans.get_mut(identity) else { continue };
            if plan.in_flight {
                continue;
            }
            if due.is_zero() {
                plan.in_flight = true;
                self.call(identity.clone());
            } else {
                next = next.min(due);
            }
        }
        if !unanswered {
            self.first_pass.set();
        }
        next
    }

    /// Takes up what is newly wanted, and forgets what has been unwanted for a while.
    fn follow(&mut self, wanted: &WantedRoles) {
        for identity in wanted.keys() {
            self.plans.entry(identity.clone()).or_default().unwanted_since = None;
        }
        let now = Instant::now();
        self.plans.retain(|identity, plan| {
            if wanted.contains_key(identity) || plan.in_flight {
                return true;
            }
            now.duration_since(*plan.unwanted_since.get_or_insert(now)) < LINGER
        });
        let plans = &self.plans;
        self.entries.send_if_modified(|entries| {
            let before = entries.len();
            entries.retain(|identity, _| plans.contains_key(identity));
            let kept = entries.len();
            for identity in wanted.keys() {
                entries.entry(identity.clone()).or_default();
            }
            before != kept || kept != entries.len()
        });
    }

    fn unanswered(&self, identity: &RoleIdentity) -> bool {
        let entries = self.entries.borrow();
        entries.get(identity).is_none_or(|entry| entry.issued.is_none() && entry.failure.is_none())
    }

    /// How long until `identity` is to be fetched.
    fn due(&self, identity: &RoleIdentity, now: Instant) -> Duration {
        let backoff = self
            .plans
            .get(identity)
            .and_then(|plan| plan.not_before)
            .map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let entries = self.entries.borrow();
        let Some(issued) = entries.get(identity).and_then(|entry| entry.issued.as_ref()) else {
            return backoff;
        };
        let credentials = &issued.credentials;
        let refresh = schedule::refresh_at(credentials.issued, credentials.expires);
        let until = refresh.duration_since(self.clock.now()).unwrap_or_default();
        until.max(backoff)
    }

    fn call(&mut self, identity: RoleIdentity) {
        let source = self.source.clone();
        let slots = self.slots.clone();
        let metrics = self.metrics.clone();
        self.calls.spawn(async move {
            let _slot = slots.acquire_owned().await;
            let begun = Instant::now();
            let result = source.issue(&identity).await;
            metrics.issued(begun.elapsed(), result.as_ref().err().map(|error| error.class));
            (identity, result)
        });
    }

    /// Keeps what came, or keeps what was there.
    fn settle(&mut self, identity: RoleIdentity, result: Result<Credentials, SourceError>) {
        let now = self.clock.now();
        let result = result.and_then(|credentials| checked(credentials, &identity, now));
        let Some(plan) = self.plans.get_mut(&identity) else { return };
        plan.in_flight = false;
        match result {
            Ok(credentials) => {
                plan.failures = 0;
                // A little spread, so that what was fetched together is not renewed together.
                let quarter = credentials.expires.duration_since(now).unwrap_or_default() / 4;
                plan.not_before = Some(Instant::now() + schedule::jittered(quarter));
                info!(
                    pod.iam.role = %identity.role,
                    credentials.access.key = %credentials.access_key_id,
                    credentials.expiration = %humantime::format_rfc3339_seconds(credentials.expires),
                    "Issued credentials"
                );
                let rendered = (self.render)(&credentials);
                let issued = Some(Arc::new(Issued { credentials, rendered }));
                self.write(identity, Entry { issued, failure: None });
            }
            Err(error) => {
                plan.failures += 1;
                let wait = schedule::jittered(schedule::backoff(error.class, plan.failures));
                plan.not_before = Some(Instant::now() + wait);
                warn!(pod.iam.role = %identity.role, %error, retry_in = ?wait, "Credentials not issued");
                let issued = self.entries.borrow().get(&identity).and_then(|e| e.issued.clone());
                let failure = Some((Arc::new(error), now + wait));
                self.write(identity, Entry { issued, failure });
            }
        }
    }

    fn write(&self, identity: RoleIdentity, entry: Entry) {
        self.entries.send_modify(|entries| {
            entries.insert(identity, entry);
        });
    }
}

/// An answer that must not be served is an error.
fn checked(
    credentials: Credentials,
    identity: &RoleIdentity,
    now: SystemTime,
) -> Result<Credentials, SourceError> {
    let problem = if credentials.role != identity.role {
        "STS answered credentials of another role"
    } else if credentials.access_key_id.is_empty()
        || credentials.secret_access_key.expose().is_empty()
        || credentials.session_token.expose().is_empty()
    {
        "STS answered credentials with an empty field"
    } else if !schedule::valid(&credentials, now) {
        "STS answered credentials that have expired (is the node's clock right?)"
    } else {
        return Ok(credentials);
    };
    Err(SourceError { class: ErrorClass::Retryable, message: problem.to_owned() })
}

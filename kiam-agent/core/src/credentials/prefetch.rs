//! Fetching what is wanted before it is asked for, and keeping it fresh.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep},
};
use tracing::info;

use super::{
    Config, CredentialReader, CredentialSource, Credentials, ErrorClass, Inheritance,
    IssuedCredentials, Limit, Metrics, Names, Render, Silence,
    arrivals::Arrivals,
    budget::{Bucket, Delay, Shares},
    call::{FinishedCall, answer, checked},
    call_log::CallLog,
    pace::Paces,
    plan::Plan,
    queue::{NewIdentity, Queue},
    refresh::{self, RefreshRequest, Refresher},
    schedule::{self, Term},
    stale::Staleness,
    store::{Entries, Entry, HeldRequests},
};
use crate::{
    clock::Clock,
    lifecycle::{Drain, Latch},
    role::{Claimant, RoleIdentity, WantedRoles},
};

/// Calls to STS in flight at once.
const IN_FLIGHT: usize = 16;

/// A source that goes on to find sessions too long is tried again at once so often, which is more than it needs.
const TOO_LONG: u32 = 8;

/// What nobody wants any more is kept for this long: a pod's successor often comes at once.
const LINGER: Duration = Duration::from_secs(60);

/// The schedule is looked at again at least this often: the wall clock may step.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// While the watch of the pods is silent for too long, its return is looked for this often.
const LOOK_FOR_LIFE: Duration = Duration::from_secs(1);

/// Keeps the wanted identities' credentials; [`Prefetcher::run`] is its task.
pub struct Prefetcher {
    config: Config,
    parts: PrefetcherParts,
    entries: watch::Sender<Entries>,
    held_requests: HeldRequests,
    plans: HashMap<RoleIdentity, Plan>,
    calls: JoinSet<FinishedCall>,
    /// The node's calls.
    node: Bucket,
    paces: Paces,
    shares: Shares,
    arrivals: Arrivals,
    inheritance: Inheritance,
    refresher: Refresher,
    refreshes: mpsc::Receiver<RefreshRequest>,
    /// Whether nothing was looked at yet.
    starting: bool,
    staleness: Staleness,
}

/// What the prefetcher works with.
pub struct PrefetcherParts {
    /// Where credentials come from.
    pub source: Arc<dyn CredentialSource>,
    /// Renders the answers.
    pub render: Render,
    /// Tells when they expire.
    pub clock: Clock,
    /// What pods want.
    pub wanted: watch::Receiver<WantedRoles>,
    /// Whether that can still be believed.
    pub silence: Silence,
    /// Names pods in the log.
    pub names: Names,
    /// Its counters.
    pub metrics: Metrics,
    /// Set once every identity of the first set that was wanted has been answered, well or badly.
    pub first_pass: Latch,
}

// === impl Prefetcher ===

impl Prefetcher {
    /// A prefetcher and the reader of what it holds.
    #[must_use]
    pub fn new(config: Config, parts: PrefetcherParts) -> (Self, CredentialReader) {
        let entries = watch::Sender::new(Entries::new());
        let held_requests = HeldRequests::default();
        let reader =
            CredentialReader::new(entries.subscribe(), held_requests.clone(), parts.clock.clone());
        let (refresher, refreshes) = refresh::channel();
        let prefetcher = Self {
            config,
            parts,
            entries,
            held_requests,
            plans: HashMap::new(),
            calls: JoinSet::new(),
            node: Bucket::default(),
            paces: Paces::default(),
            shares: Shares::default(),
            arrivals: Arrivals::default(),
            inheritance: Inheritance::default(),
            refresher,
            refreshes,
            starting: true,
            staleness: Staleness::default(),
        };
        (prefetcher, reader)
    }

    /// What has it ask out of turn.
    #[must_use]
    pub fn refresher(&self) -> Refresher {
        self.refresher.clone()
    }

    /// Is given what another agent held. What of it is wanted at the first look is held here too, and paid for.
    pub fn inherit(&mut self, inheritance: Inheritance) {
        self.inheritance = inheritance;
    }

    /// Works until the drain begins. Calls in flight are then given up: nobody waits for them.
    pub async fn run(mut self, mut drain: Drain) {
        loop {
            let next = self.step();
            tokio::select! {
                Ok(()) = self.parts.wanted.changed() => {}
                Some(done) = self.calls.join_next() => {
                    // An error is the runtime's end: no call panics, and nobody aborts one.
                    if let Ok(called) = done {
                        self.settle(called);
                    }
                }
                Some((identity, waiting)) = self.refreshes.recv() => {
                    // Dropped, it tells that nobody wants it.
                    if let Some(plan) = self.plans.get_mut(&identity) {
                        plan.refresh(waiting);
                    }
                }
                () = sleep(next) => {}
                () = drain.started() => return,
            }
        }
    }

    /// Compares what is wanted with what is held, starts what is due, and says when to look again.
    fn step(&mut self) -> Duration {
        let wanted = self.parts.wanted.borrow_and_update().clone();
        let now = Instant::now();
        self.follow(&wanted, now);
        self.claim(&wanted);
        self.receive(&wanted, now);
        let (mut queue, mut next) = self.queue(&wanted, now);
        let (most, silence) = (self.config.max_staleness, (self.parts.silence)());
        let stopped = if self.staleness.is_over(most, silence) {
            Some((Limit::Stale, LOOK_FOR_LIFE))
        } else {
            self.start(&mut queue, &wanted, now)
        };
        let limits = queue.limits((&self.shares, &self.paces), stopped, now);
        next = limits.values().map(|(_, wait)| *wait).fold(next, Duration::min);
        self.show(&limits, now);
        let unanswered = wanted.keys().any(|identity| self.unanswered(identity));
        if !unanswered {
            self.parts.first_pass.set();
        }
        next
    }

    /// What is due, and how long until more will be.
    fn queue<'a>(&self, wanted: &'a WantedRoles, now: Instant) -> (Queue<'a>, Duration) {
        let (mut queue, mut next) = (Queue::default(), LOOK_AGAIN);
        for (identity, claimants) in wanted.iter() {
            let Some(plan) = self.plans.get(identity).filter(|plan| !plan.in_flight) else {
                continue;
            };
            if plan.is_urgent() {
                queue.renew(identity, Duration::ZERO);
                continue;
            }
            let (wait, left) = (self.due(identity, now), self.left(identity, now));
            let asked = || self.held_requests.has(identity);
            if !wait.is_zero() {
                next = next.min(wait);
                let claimants: Vec<_> = plan.newcomers(claimants).collect();
                if !claimants.is_empty() && left.is_none_or(|left| left.is_zero()) {
                    queue.add(NewIdentity { identity, claimants, asked: asked(), paid: false });
                }
            } else if let Some(left) = left {
                queue.renew(identity, left);
            } else {
                let claimants = claimants.iter().collect();
                queue.add(NewIdentity { identity, claimants, asked: asked(), paid: plan.paid });
            }
        }
        (queue, next)
    }

    /// Starts of `queue` what may be. Says what ended that, and for how long at most.
    fn start(
        &mut self,
        queue: &mut Queue<'_>,
        wanted: &WantedRoles,
        now: Instant,
    ) -> Option<Delay> {
        let rate = self.config.sts_rate;
        loop {
            if self.calls.len() >= IN_FLIGHT {
                return Some((Limit::InFlight, LOOK_AGAIN));
            }
            let wait = self.node.wait(rate, now);
            if !wait.is_zero() {
                return Some((Limit::Node, wait));
            }
            let (identity, payer) = queue.take(&mut self.shares, &self.paces, now)?;
            self.node.take(rate, now);
            self.paces.take(identity, now);
            if let Some(plan) = self.plans.get_mut(identity) {
                let claimant = plan.begin(&wanted[identity], payer);
                self.call(identity.clone(), claimant);
            }
        }
    }

    /// Lets readers and operators know what waits for what.
    fn show(&self, limits: &HashMap<RoleIdentity, Delay>, now: Instant) {
        self.parts.metrics.rate(self.paces.slowest(self.config.sts_rate, now));
        self.parts.metrics.waiting(limits.values().map(|(limit, _)| limit));
        self.entries.send_if_modified(|entries| {
            let mut changed = false;
            for (identity, entry) in entries {
                let limit = limits.get(identity).map(|(limit, _)| *limit);
                changed |= entry.limit != limit;
                entry.limit = limit;
            }
            changed
        });
    }

    /// How long what is held is still good.
    fn left(&self, identity: &RoleIdentity, now: Instant) -> Option<Duration> {
        let entries = self.entries.borrow();
        let issued = entries.get(identity)?.issued.as_ref()?;
        Some(issued.term.left(self.parts.clock.now(), now))
    }

    /// Takes up what is newly wanted, and forgets what has been unwanted for a while.
    fn follow(&mut self, wanted: &WantedRoles, now: Instant) {
        // What pods want when the agent starts is nothing new, and may have been held by the agent before.
        let paid = std::mem::take(&mut self.starting);
        for identity in wanted.keys() {
            let plan = self.plans.entry(identity.clone());
            plan.or_insert_with(|| Plan::new(paid)).unwanted_since = None;
        }
        self.plans.retain(|identity, plan| {
            if wanted.contains_key(identity) || plan.in_flight {
                return true;
            }
            // What was never asked for leaves nothing to keep, however much of it there is.
            plan.paid && now.duration_since(*plan.unwanted_since.get_or_insert(now)) < LINGER
        });
        let namespaces: HashSet<&str> =
            wanted.values().flatten().map(|claimant| &*claimant.namespace).collect();
        self.shares.forget(|namespace| namespaces.contains(&**namespace), now);
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

    /// Takes what of the inheritance is wanted; the rest is dropped.
    fn claim(&mut self, wanted: &WantedRoles) {
        let mut inheritance = std::mem::take(&mut self.inheritance);
        let given = inheritance.len();
        let mut taken = 0;
        for identity in wanted.keys() {
            if let Some((credentials, term)) = inheritance.take(identity, &self.parts.clock) {
                self.keep(identity.clone(), credentials, term);
                taken += 1;
            }
        }
        if given > 0 {
            info!(taken, given, "Took over credentials from the agent before this one");
        }
    }

    /// Tells how long those pods waited that wait no more.
    fn receive(&mut self, wanted: &WantedRoles, now: Instant) {
        let mut arrivals = std::mem::take(&mut self.arrivals);
        let held = |identity: &_| self.left(identity, now).is_some_and(|left| !left.is_zero());
        for waited in arrivals.follow(wanted, held, now) {
            self.parts.metrics.ready(waited);
        }
        self.arrivals = arrivals;
    }

    fn unanswered(&self, identity: &RoleIdentity) -> bool {
        let entries = self.entries.borrow();
        entries.get(identity).is_none_or(|entry| {
            let answered = entry.issued.is_some() || entry.failure.is_some();
            // Who is kept back for having asked too much keeps nobody else waiting.
            !answered && entry.limit.is_none_or(Limit::is_queue)
        })
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
        issued.term.refresh_in(self.parts.clock.now(), now).max(backoff)
    }

    fn call(&mut self, identity: RoleIdentity, claimant: Claimant) {
        let source = self.parts.source.clone();
        let metrics = self.parts.metrics.clone();
        self.calls.spawn(async move {
            let begun = Instant::now();
            let result = answer(async { source.issue(&identity, &claimant).await }).await;
            metrics.issued(begun.elapsed(), result.as_ref().err().map(|error| error.class));
            FinishedCall { identity, claimant, begun, result }
        });
    }

    /// Keeps what came, or keeps what was there.
    fn settle(&mut self, FinishedCall { identity, claimant, begun, result }: FinishedCall) {
        let now = Instant::now();
        let clock = &self.parts.clock;
        let drawn = (begun, fastrand::f64());
        let result = result.and_then(|answer| checked(answer, drawn, &identity, clock));
        let error = result.as_ref().err().map(|error| error.class);
        self.paces.answered(&identity, (self.config.sts_rate, begun), error, now);
        let Some(plan) = self.plans.get_mut(&identity) else { return };
        plan.in_flight = false;
        if let Some(payer) = &plan.payer {
            let denied = result.as_ref().is_err_and(|error| error.class == ErrorClass::Denied);
            if result.is_ok() || denied && plan.failures == 0 {
                self.shares.answered(payer, denied, now);
            }
        }
        let log = CallLog::new(&identity, &claimant, &self.parts.names);
        match result {
            Ok((credentials, term)) => {
                plan.issued(now, schedule::SOONEST);
                plan.tell(Ok(()));
                log.issued(&credentials);
                self.keep(identity, credentials, term);
            }
            Err(error) if error.class == ErrorClass::TooLong && plan.too_long < TOO_LONG => {
                plan.too_long += 1;
            }
            Err(error) => {
                let wait = plan.failed(error.class, now);
                log.failed(&error, wait);
                let error = Arc::new(error);
                plan.tell(Err(&error));
                let issued = self.entries.borrow().get(&identity).and_then(|e| e.issued.clone());
                let failure = Some((error, now + wait));
                self.write(identity, Entry { issued, failure, limit: None });
            }
        }
    }

    fn keep(&self, identity: RoleIdentity, credentials: Credentials, term: Term) {
        let rendered = (self.parts.render)(&credentials);
        let issued = Some(Arc::new(IssuedCredentials { credentials, rendered, term }));
        self.write(identity, Entry { issued, failure: None, limit: None });
    }

    fn write(&self, identity: RoleIdentity, entry: Entry) {
        self.entries.send_modify(|entries| {
            entries.insert(identity, entry);
        });
    }
}

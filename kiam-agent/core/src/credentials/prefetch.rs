//! Fetches credentials before pods ask for them, and renews them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep},
};
use tracing::info;

use super::{
    Config, CredentialReader, Credentials, ErrorClass, Inheritance, IssuedCredentials, Limit,
    PrefetcherParts,
    arrivals::Arrivals,
    budget::{Delay, Shares},
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
    lifecycle::Drain,
    rate::Bucket,
    role::{Claimant, RoleIdentity, WantedRoles},
};

/// Calls to STS in flight at once.
const IN_FLIGHT: usize = 16;
/// Immediate retries after [`ErrorClass::TooLong`]: more than any source needs.
const TOO_LONG: u32 = 8;
/// Credentials that no pod wants any more are kept for this long: a pod's successor often comes at once.
const LINGER: Duration = Duration::from_secs(60);

/// The longest pause between two steps: the wall clock may be stepped.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// The pause between two steps while a watch of the Kubernetes API is stale.
const STALE_PAUSE: Duration = Duration::from_secs(1);

/// The writer of the credential cache; [`Prefetcher::run`] is its task.
pub struct Prefetcher {
    config: Config,
    parts: PrefetcherParts,
    entries: watch::Sender<Entries>,
    held_requests: HeldRequests,
    plans: HashMap<RoleIdentity, Plan>,
    calls: JoinSet<FinishedCall>,
    /// The node's budget.
    node: Bucket,
    paces: Paces,
    shares: Shares,
    arrivals: Arrivals,
    inheritance: Inheritance,
    refresher: Refresher,
    refreshes: mpsc::Receiver<RefreshRequest>,
    /// Whether the first step is still to come.
    starting: bool,
    /// The wanted set of the last step. While it is held here, no other one is at its address.
    last: Weak<BTreeMap<RoleIdentity, BTreeSet<Claimant>>>,
    answered: bool,
    swept: Instant,
    staleness: Staleness,
}

// === impl Prefetcher ===

impl Prefetcher {
    /// A prefetcher, and a reader of its cache.
    #[must_use]
    pub fn new(config: Config, parts: PrefetcherParts) -> (Self, CredentialReader) {
        let entries = watch::Sender::new(Entries::default());
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
            last: Weak::new(),
            answered: false,
            swept: Instant::now(),
            staleness: Staleness::default(),
        };
        (prefetcher, reader)
    }

    /// A handle that requests calls out of turn.
    #[must_use]
    pub fn refresher(&self) -> Refresher {
        self.refresher.clone()
    }

    /// Adopts the predecessor's credentials. Those that pods want at the first step are kept.
    pub fn inherit(&mut self, inheritance: Inheritance) {
        self.inheritance = inheritance;
    }

    /// Runs until the drain begins, then gives up the calls in flight.
    pub async fn run(mut self, mut drain: Drain) {
        loop {
            let next = self.step();
            tokio::select! {
                Ok(()) = self.parts.wanted.changed() => {}
                Some(done) = self.calls.join_next() => {
                    // An error means the runtime's end: no call panics or is aborted.
                    if let Ok(called) = done {
                        self.settle(called);
                    }
                }
                Some((identity, reply)) = self.refreshes.recv() => {
                    // Dropping `reply` answers that no pod wants the role.
                    if let Some(plan) = self.plans.get_mut(&identity) {
                        plan.refresh(reply);
                    }
                }
                () = sleep(next) => {}
                () = drain.started() => return,
            }
        }
    }

    /// Compares the wanted roles with the cache, starts the calls that are due, and returns the time until the next step.
    fn step(&mut self) -> Duration {
        let wanted = self.parts.wanted.borrow_and_update().clone();
        let last = std::mem::replace(&mut self.last, Arc::downgrade(&wanted));
        let news = !self.last.ptr_eq(&last);
        let now = Instant::now();
        self.follow(&wanted, news, now);
        if self.inheritance.len() > 0 {
            self.claim(&wanted);
        }
        if news || self.arrivals.is_waiting() {
            self.receive(&wanted, now);
        }
        let (mut queue, mut next) = self.queue(&wanted, now);
        let (most, silence) = (self.config.max_staleness, (self.parts.silence)());
        let stopped = if self.staleness.is_over(most, silence) {
            Some((Limit::Stale, STALE_PAUSE))
        } else {
            self.start(&mut queue, &wanted, now)
        };
        let limits = queue.limits((&self.shares, &self.paces), stopped, now);
        next = limits.values().map(|(_, wait)| *wait).fold(next, Duration::min);
        self.show(&limits, now);
        if !self.answered && !wanted.keys().any(|identity| self.unanswered(identity)) {
            self.answered = true;
            self.parts.first_pass.set();
        }
        next
    }

    /// The calls that are due, and the time until more are.
    fn queue<'a>(&self, wanted: &'a WantedRoles, now: Instant) -> (Queue<'a>, Duration) {
        let (mut queue, mut next) = (Queue::default(), LONGEST_PAUSE);
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

    /// Starts the calls of `queue` that the budget allows. Returns the limit that stopped it, if any.
    fn start(
        &mut self,
        queue: &mut Queue<'_>,
        wanted: &WantedRoles,
        now: Instant,
    ) -> Option<Delay> {
        let rate = self.config.sts_rate;
        loop {
            if self.calls.len() >= IN_FLIGHT {
                return Some((Limit::InFlight, LONGEST_PAUSE));
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

    /// Publishes the limits to readers and metrics.
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

    /// The remaining life of the cached credentials.
    fn left(&self, identity: &RoleIdentity, now: Instant) -> Option<Duration> {
        let entries = self.entries.borrow();
        let issued = entries.get(identity)?.issued.as_ref()?;
        Some(issued.term.left(self.parts.clock.now(), now))
    }

    /// Adds newly wanted identities, and forgets those that have been unwanted for [`LINGER`].
    fn follow(&mut self, wanted: &WantedRoles, news: bool, now: Instant) {
        // Roles that pods want at the start are not new: the previous agent may have had them.
        let paid = std::mem::take(&mut self.starting);
        for identity in wanted.keys().filter(|_| news) {
            match self.plans.get_mut(identity) {
                Some(plan) => plan.unwanted_since = None,
                None => drop(self.plans.insert(identity.clone(), Plan::new(paid))),
            }
        }
        if now.duration_since(self.swept) >= LONGEST_PAUSE {
            self.swept = now;
            let namespaces: HashSet<&str> =
                wanted.values().flatten().map(|claimant| &*claimant.namespace).collect();
            self.shares.forget(|namespace| namespaces.contains(&**namespace), now);
        }
        if !news && self.plans.len() == wanted.len() {
            return;
        }
        self.plans.retain(|identity, plan| {
            if wanted.contains_key(identity) || plan.in_flight {
                return true;
            }
            // An identity without a call so far has nothing to keep.
            plan.paid && now.duration_since(*plan.unwanted_since.get_or_insert(now)) < LINGER
        });
        let plans = &self.plans;
        self.entries.send_if_modified(|entries| {
            let before = entries.len();
            entries.retain(|identity, _| plans.contains_key(identity));
            let kept = entries.len();
            for identity in wanted.keys() {
                if !entries.contains_key(identity) {
                    entries.insert(identity.clone(), Entry::default());
                }
            }
            before != kept || kept != entries.len()
        });
    }

    /// Adopts the inherited credentials that pods want, and drops the rest.
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
        info!(taken, given, "Inherited credentials from the previous agent");
    }

    /// Records the wait of each pod that has its first credentials now.
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
            // A pod that waits for its own excess does not delay the start.
            !answered && entry.limit.is_none_or(Limit::is_queue)
        })
    }

    /// The time until the next call for `identity`.
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

    /// Stores the outcome of a call. After a failure the earlier credentials stay.
    fn settle(&mut self, FinishedCall { identity, claimant, begun, result }: FinishedCall) {
        let now = Instant::now();
        let clock = &self.parts.clock;
        let draw = (begun, fastrand::f64());
        let result = result.and_then(|answer| checked(answer, draw, &identity, clock));
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
                plan.reply(Ok(()));
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
                plan.reply(Err(&error));
                let issued = self.entries.borrow().get(&identity).and_then(|e| e.issued.clone());
                let failure = Some((error, now + wait));
                self.write(identity, Entry { issued, failure, limit: None });
            }
        }
    }

    fn keep(&self, identity: RoleIdentity, credentials: Credentials, term: Term) {
        let rendered = (self.parts.render)(&credentials);
        let session_name = identity.session_name.clone();
        let issued = Some(IssuedCredentials { credentials, rendered, session_name, term }.into());
        self.write(identity, Entry { issued, failure: None, limit: None });
    }

    fn write(&self, identity: RoleIdentity, entry: Entry) {
        self.entries.send_modify(|entries| {
            entries.insert(identity, entry);
        });
    }
}

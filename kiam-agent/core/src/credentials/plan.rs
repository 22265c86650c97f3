//! The plan of one identity: when its next call is due.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{ErrorClass, SourceError, refresh::RefreshReply, schedule};
use crate::role::Claimant;

/// The state of one identity's calls: when the next is due, and for whom.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) in_flight: bool,
    pub(super) failures: u32,
    /// Calls in a row for sessions that were too long.
    pub(super) too_long: u32,
    /// By tokio's clock, which no step moves.
    pub(super) not_before: Option<Instant>,
    pub(super) unwanted_since: Option<Instant>,
    /// Whether no share need pay any more: one has paid, or a pod requested the identity when the agent started.
    pub(super) paid: bool,
    /// The pod whose share has paid.
    pub(super) payer: Option<Claimant>,
    /// Whether the last call was denied; the next may be denied too for ten minutes.
    denied: bool,
    /// The pods that the last call was made for.
    asked_for: BTreeSet<Claimant>,
    /// Operators who wait for the next call, and for the one in flight.
    next_call: Vec<RefreshReply>,
    this_call: Vec<RefreshReply>,
}

// === impl Plan ===

impl Plan {
    /// The plan of a new identity. `paid`: a pod requested it when the agent started, so that no share need pay.
    pub(super) fn new(paid: bool) -> Self {
        Self { paid, ..Self::default() }
    }

    /// Those of `claimants` that came after the last denial. Their pods may have been recreated because somebody fixed
    /// the role, so that each may have one call at once, if its share allows one.
    pub(super) fn newcomers<'a>(
        &self,
        claimants: &'a BTreeSet<Claimant>,
    ) -> impl Iterator<Item = &'a Claimant> {
        let claimants = self.denied.then_some(claimants);
        claimants.into_iter().flatten().filter(|claimant| !self.asked_for.contains(claimant))
    }

    /// Records that an operator requested a call now.
    pub(super) fn refresh(&mut self, reply: RefreshReply) {
        self.next_call.push(reply);
    }

    /// Whether an operator requested a call now.
    pub(super) fn is_urgent(&self) -> bool {
        !self.next_call.is_empty()
    }

    /// Begins a call for `claimants`, paid by the share of `payer`, if any. Returns the pod that vouches for the call:
    /// after a failure the next one, so that a pod that is about to end does not block renewals for others.
    pub(super) fn begin(
        &mut self,
        claimants: &BTreeSet<Claimant>,
        payer: Option<&Claimant>,
    ) -> Claimant {
        self.in_flight = true;
        self.paid = true;
        self.asked_for.clone_from(claimants);
        self.this_call.append(&mut self.next_call);
        if let Some(payer) = payer {
            // Denials of other pods do not count for this one.
            self.failures = 0;
            self.payer = Some(payer.clone());
            return payer.clone();
        }
        let turn = self.failures as usize % claimants.len().max(1);
        claimants.iter().nth(turn).cloned().expect("each wanted identity has a claimant")
    }

    /// Records that credentials were issued. The next call is due after `pause` at the earliest.
    pub(super) fn issued(&mut self, now: Instant, pause: Duration) {
        (self.failures, self.too_long, self.denied) = (0, 0, false);
        self.not_before = Some(now + pause);
    }

    /// Records a failure and returns the time until the retry. A call out of turn delays no call that is due sooner.
    pub(super) fn failed(&mut self, class: ErrorClass, now: Instant) -> Duration {
        self.failures += 1;
        self.denied = matches!(class, ErrorClass::Denied | ErrorClass::Refused);
        let wait = schedule::jittered(schedule::backoff(class, self.failures));
        let due = self.not_before.map(|at| at.saturating_duration_since(now));
        let due = due.filter(|due| self.denied && !due.is_zero());
        let wait = due.map_or(wait, |due| due.min(wait));
        self.not_before = Some(now + wait);
        wait
    }

    /// Sends the call's outcome to the operators who wait for it.
    pub(super) fn reply(&mut self, answer: Result<(), &Arc<SourceError>>) {
        for reply in self.this_call.drain(..) {
            // An operator who gave up needs no answer.
            let _ = reply.send(answer.map_err(Arc::clone));
        }
    }
}

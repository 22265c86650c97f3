//! What is to happen to one identity.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{ErrorClass, SourceError, refresh::RefreshReply, schedule};
use crate::role::Claimant;

/// When it is asked for next, and who has a say in it.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) in_flight: bool,
    pub(super) failures: u32,
    /// Calls in a row for sessions that were too long.
    pub(super) too_long: u32,
    /// By tokio's clock, which no step moves.
    pub(super) not_before: Option<Instant>,
    pub(super) unwanted_since: Option<Instant>,
    /// Whether no share need be asked any more: one has paid, or it was wanted when the agent started.
    pub(super) paid: bool,
    /// Whose share has paid.
    pub(super) payer: Option<Claimant>,
    /// Whether the last call was denied, which the next one may be too for ten minutes.
    denied: bool,
    /// For whom the last call was made.
    asked_for: BTreeSet<Claimant>,
    /// Operators who wait for a call that is yet to begin, and for the one that is under way.
    next_call: Vec<RefreshReply>,
    this_call: Vec<RefreshReply>,
}

// === impl Plan ===

impl Plan {
    /// A plan of what was wanted when the agent started, if that has `paid`, or was not.
    pub(super) fn new(paid: bool) -> Self {
        Self { paid, ..Self::default() }
    }

    /// Those of `claimants` that came after it was denied. Whoever mended the role may have recreated the pod for it, so
    /// that each may have one call at once, if its share has one.
    pub(super) fn newcomers<'a>(
        &self,
        claimants: &'a BTreeSet<Claimant>,
    ) -> impl Iterator<Item = &'a Claimant> {
        let claimants = self.denied.then_some(claimants);
        claimants.into_iter().flatten().filter(|claimant| !self.asked_for.contains(claimant))
    }

    /// Notes that an operator wants it asked for now.
    pub(super) fn refresh(&mut self, waiting: RefreshReply) {
        self.next_call.push(waiting);
    }

    /// Whether an operator does.
    pub(super) fn is_urgent(&self) -> bool {
        !self.next_call.is_empty()
    }

    /// Begins a call for `claimants`, of whom `payer` pays for it, if anybody does. Says who vouches for it: after a
    /// failure the next one, so that a pod that is about to go keeps nobody else from a renewal.
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
            // What was denied others before is not its doing.
            self.failures = 0;
            self.payer = Some(payer.clone());
            return payer.clone();
        }
        let turn = self.failures as usize % claimants.len().max(1);
        claimants.iter().nth(turn).cloned().expect("what is wanted is wanted by somebody")
    }

    /// Notes that it was issued, to be asked for again after `pause` at the earliest.
    pub(super) fn issued(&mut self, now: Instant, pause: Duration) {
        (self.failures, self.too_long, self.denied) = (0, 0, false);
        self.not_before = Some(now + pause);
    }

    /// Notes a failure, and says after how long it is tried again. A call out of turn puts off none that is due sooner.
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

    /// Tells the operators who wait what came of the call.
    pub(super) fn tell(&mut self, answer: Result<(), &Arc<SourceError>>) {
        for waiting in self.this_call.drain(..) {
            // Whoever has gone away needs no answer.
            let _ = waiting.send(answer.map_err(Arc::clone));
        }
    }
}

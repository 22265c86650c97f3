//! The calls that are due, in order.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{
    Limit,
    budget::{Candidate, Delay, Shares},
    pace::Paces,
};
use crate::role::{Claimant, RoleIdentity};

/// All calls that are due now.
#[derive(Default)]
pub(super) struct Queue<'a> {
    /// Cached identities, with the remaining life.
    renewals: Vec<(Duration, &'a RoleIdentity)>,
    new: Vec<NewIdentity<'a>>,
}

/// An identity without cached credentials.
pub(super) struct NewIdentity<'a> {
    pub(super) identity: &'a RoleIdentity,
    pub(super) claimants: Vec<&'a Claimant>,
    /// Whether a request waits for the identity now.
    pub(super) asked: bool,
    /// Whether none of the claimants need pay, since one paid for an earlier call.
    pub(super) paid: bool,
}

// === impl Queue ===

impl<'a> Queue<'a> {
    /// Adds a renewal of credentials with this much life `left`.
    pub(super) fn renew(&mut self, identity: &'a RoleIdentity, left: Duration) {
        let at = self.renewals.partition_point(|(other, _)| *other >= left);
        self.renewals.insert(at, (left, identity));
    }

    /// Adds an identity without credentials.
    pub(super) fn add(&mut self, new: NewIdentity<'a>) {
        self.new.push(new);
    }

    /// Removes the next identity, with the pod that pays for it if it is new. Renewals (the first to expire first) and
    /// new identities alternate, so that neither waits for all of the other. An identity that `paces` delays is skipped.
    pub(super) fn take(
        &mut self,
        shares: &mut Shares,
        paces: &Paces,
        now: Instant,
    ) -> Option<(&'a RoleIdentity, Option<&'a Claimant>)> {
        let may = |identity: &RoleIdentity| paces.wait(identity, now).is_zero();
        let renewal = self.renewals.iter().rposition(|(_, identity)| may(identity));
        let turn = shares.is_turn_of_new() || renewal.is_none();
        if let Some(candidate) = turn.then(|| self.take_new(shares, may, now)).flatten() {
            return Some((candidate.identity, (!candidate.paid).then_some(candidate.claimant)));
        }
        let (_, identity) = self.renewals.remove(renewal?);
        shares.take_renewal();
        Some((identity, None))
    }

    fn take_new(
        &mut self,
        shares: &mut Shares,
        may: impl Fn(&RoleIdentity) -> bool,
        now: Instant,
    ) -> Option<Candidate<'a>> {
        let ready = self.new.iter().filter(|new| may(new.identity));
        let picked = shares.pick(ready.flat_map(NewIdentity::candidates), now)?;
        shares.take(&picked, now);
        self.new.retain(|new| new.identity != picked.identity);
        Some(picked)
    }

    /// The limit of each identity that is left: the shares of its claimants, or else the limit that `stopped` all, or
    /// the pace of an account.
    pub(super) fn limits(
        &self,
        (shares, paces): (&Shares, &Paces),
        stopped: Option<Delay>,
        now: Instant,
    ) -> HashMap<RoleIdentity, Delay> {
        let common = |identity| {
            let wait = paces.wait(identity, now);
            stopped.or_else(|| (!wait.is_zero()).then_some((Limit::Throttled, wait)))
        };
        let renewals = self.renewals.iter().map(|(_, identity)| (*identity, common(identity)));
        let new = self.new.iter().map(|new| {
            let limits = new.candidates().map(|candidate| shares.keeps_back(&candidate, now));
            let own = limits.min_by_key(|limit| limit.map(|(_, wait)| wait)).flatten();
            (new.identity, own.or_else(|| common(new.identity)))
        });
        let all = renewals.chain(new);
        all.filter_map(|(identity, limit)| Some((identity.clone(), limit?))).collect()
    }
}

// === impl NewIdentity ===

impl<'a> NewIdentity<'a> {
    fn candidates(&self) -> impl Iterator<Item = Candidate<'a>> {
        let &Self { identity, asked, paid, .. } = self;
        self.claimants.iter().map(move |claimant| Candidate { claimant, identity, asked, paid })
    }
}

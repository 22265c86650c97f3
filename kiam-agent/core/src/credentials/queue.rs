//! What is due, in the order in which it is asked for.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{
    Limit,
    budget::{Candidate, Delay, Shares},
    pace::Paces,
};
use crate::role::{Claimant, RoleIdentity};

/// Everything that may be asked for now.
#[derive(Default)]
pub(super) struct Queue<'a> {
    /// Held, and for how long.
    renewals: Vec<(Duration, &'a RoleIdentity)>,
    new: Vec<NewIdentity<'a>>,
}

/// Something that is not held.
pub(super) struct NewIdentity<'a> {
    pub(super) identity: &'a RoleIdentity,
    pub(super) claimants: Vec<&'a Claimant>,
    /// Whether a request is held for it now.
    pub(super) asked: bool,
    /// Whether none of these need pay: one did when it was asked for before.
    pub(super) paid: bool,
}

// === impl Queue ===

impl<'a> Queue<'a> {
    /// Adds something that is held, with this much life `left`.
    pub(super) fn renew(&mut self, identity: &'a RoleIdentity, left: Duration) {
        let at = self.renewals.partition_point(|(other, _)| *other >= left);
        self.renewals.insert(at, (left, identity));
    }

    /// Adds something new.
    pub(super) fn add(&mut self, new: NewIdentity<'a>) {
        self.new.push(new);
    }

    /// Takes out what is next, with the pod that pays for it if it is new. Renewals, the one that expires first
    /// before others, and what is new alternate, so that neither waits for all of the other. What `paces` has wait
    /// has no turn.
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

    /// What keeps back each that is left: the shares of those who want it, or else what `stopped` all, or the pace of
    /// an account.
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

//! The time that new pods wait for their first credentials.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::role::{Claimant, RoleIdentity, WantedRoles};

/// The pods that request credentials, with the time since when each waits for its first ones.
#[derive(Default)]
pub(super) struct Arrivals {
    pods: HashMap<Claimant, Arrival>,
    /// The pods that wait.
    waiting: usize,
    /// The number of the last comparison.
    round: u64,
}

struct Arrival {
    waits_since: Option<Instant>,
    seen: u64,
}

// === impl Arrivals ===

impl Arrivals {
    /// Compares with the roles `wanted` and `held` now, and returns the wait of each pod that has credentials for the
    /// first time.
    pub(super) fn follow(
        &mut self,
        wanted: &WantedRoles,
        held: impl Fn(&RoleIdentity) -> bool,
        now: Instant,
    ) -> Vec<Duration> {
        (self.round, self.waiting) = (self.round + 1, 0);
        let mut waited = Vec::new();
        for (identity, claimants) in wanted.iter() {
            let held = held(identity);
            for claimant in claimants {
                let arrival = self.arrival(claimant, now);
                if held && let Some(since) = arrival.waits_since.take() {
                    waited.push(now.duration_since(since));
                }
                let waits = arrival.waits_since.is_some();
                self.waiting += usize::from(waits);
            }
        }
        self.pods.retain(|_, arrival| arrival.seen == self.round);
        waited
    }

    /// Whether a pod waits.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting > 0
    }

    fn arrival(&mut self, claimant: &Claimant, now: Instant) -> &mut Arrival {
        if !self.pods.contains_key(claimant) {
            let new = Arrival { waits_since: Some(now), seen: self.round };
            self.pods.insert(claimant.clone(), new);
        }
        let arrival = self.pods.get_mut(claimant).expect("it was there, or is now");
        arrival.seen = self.round;
        arrival
    }
}

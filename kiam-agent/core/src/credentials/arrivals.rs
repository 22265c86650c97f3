//! The time that new pods wait for their first credentials.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::role::{Claimant, RoleIdentity, WantedRoles};

/// The pods that request credentials, with the time since when each waits for its first ones.
#[derive(Default)]
pub(super) struct Arrivals {
    pods: HashMap<Claimant, Arrival>,
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
        self.round += 1;
        let mut waited = Vec::new();
        for (identity, claimants) in wanted.iter() {
            let held = held(identity);
            for claimant in claimants {
                let arrival = self.arrival(claimant, now);
                if held && let Some(since) = arrival.waits_since.take() {
                    waited.push(now.duration_since(since));
                }
            }
        }
        self.pods.retain(|_, arrival| arrival.seen == self.round);
        waited
    }

    fn arrival(&mut self, claimant: &Claimant, now: Instant) -> &mut Arrival {
        let new = Arrival { waits_since: Some(now), seen: self.round };
        let arrival = self.pods.entry(claimant.clone()).or_insert(new);
        arrival.seen = self.round;
        arrival
    }
}

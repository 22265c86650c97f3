//! How long new pods wait for their credentials.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::role::{Claimant, RoleIdentity, WantedRoles};

/// The pods that want something, and since when those wait that have never had it.
#[derive(Default)]
pub(super) struct Arrivals {
    pods: HashMap<Claimant, Arrival>,
    /// The look's number.
    look: u64,
}

struct Arrival {
    waits_since: Option<Instant>,
    seen: u64,
}

// === impl Arrivals ===

impl Arrivals {
    /// Compares with what is `wanted` and `held` now. How long each pod waited that has its credentials for the
    /// first time.
    pub(super) fn follow(
        &mut self,
        wanted: &WantedRoles,
        held: impl Fn(&RoleIdentity) -> bool,
        now: Instant,
    ) -> Vec<Duration> {
        self.look += 1;
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
        self.pods.retain(|_, arrival| arrival.seen == self.look);
        waited
    }

    fn arrival(&mut self, claimant: &Claimant, now: Instant) -> &mut Arrival {
        let new = Arrival { waits_since: Some(now), seen: self.look };
        let arrival = self.pods.entry(claimant.clone()).or_insert(new);
        arrival.seen = self.look;
        arrival
    }
}

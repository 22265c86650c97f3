//! The pace of calls to an account's STS while it throttles: pure functions of now.
//!
//! The quota belongs to all nodes of the account, and to others. Only throttling errors show that it is used up. So
//! each node halves its own pace at such an error, and raises it in small steps with each answer, as TCP does. Nodes
//! that do so share the quota. Backing off each key alone would not slow a node with many keys. One account's
//! throttling slows no other account's keys.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::{ErrorClass, Rate, schedule};
use crate::role::RoleIdentity;

/// The slowest pace: 5,000 nodes at this pace stay far below the quota of 600 calls a second.
const SLOWEST: Duration = Duration::from_secs(30);

/// An answer raises the pace by one call in this time, so that any pace doubles in about this time.
const STEP: Duration = Duration::from_secs(10);

/// A lowered pace is forgotten after this time without throttling.
const FORGET_AFTER: Duration = Duration::from_secs(120);

/// The pace of calls to one account's STS, beside the node's own [`Rate`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace(Option<Throttle>);

#[derive(Clone, Copy, Debug)]
struct Throttle {
    /// The time from one call to the next.
    period: Duration,
    at: Instant,
    next: Instant,
}

/// The paces of the accounts that throttle.
#[derive(Debug, Default)]
pub(super) struct Paces(HashMap<String, Pace>);

// === impl Pace ===

impl Pace {
    /// The time until the next call.
    #[must_use]
    pub fn wait(&self, now: Instant) -> Duration {
        self.lowered(now).map_or(Duration::ZERO, |it| it.next.saturating_duration_since(now))
    }

    /// Records a call.
    pub fn take(&mut self, now: Instant) {
        self.0 = self.lowered(now);
        if let Some(lowered) = &mut self.0 {
            lowered.next = now + schedule::jittered(lowered.period);
        }
    }

    /// Records that a call that began at `begun` was throttled; `rate` is the node's own. Calls that were in flight
    /// together count once.
    pub fn throttled(&mut self, rate: Rate, begun: Instant, now: Instant) {
        let before = self.lowered(now);
        if before.is_some_and(|before| begun < before.at) {
            return;
        }
        let period = before.map_or(rate.period, |before| before.period) * 2;
        let period = period.min(SLOWEST.max(rate.period));
        self.0 = Some(Throttle { period, at: now, next: now + schedule::jittered(period) });
    }

    /// Records that a call was answered.
    pub fn answered(&mut self, rate: Rate, now: Instant) {
        let Some(lowered) = self.lowered(now) else { return };
        let (period, step) = (lowered.period.as_secs_f64(), STEP.as_secs_f64());
        let period = Duration::from_secs_f64(period * step / (period + step));
        self.0 = (period > rate.period).then_some(Throttle { period, ..lowered });
    }

    /// The time from one call to the next, while the pace is lowered.
    #[must_use]
    pub fn period(&self, now: Instant) -> Option<Duration> {
        self.lowered(now).map(|lowered| lowered.period)
    }

    fn lowered(&self, now: Instant) -> Option<Throttle> {
        self.0.filter(|lowered| now.saturating_duration_since(lowered.at) < FORGET_AFTER)
    }
}

// === impl Paces ===

impl Paces {
    /// The time until STS may be called for `identity`.
    pub(super) fn wait(&self, identity: &RoleIdentity, now: Instant) -> Duration {
        self.0.get(quota(identity)).map_or(Duration::ZERO, |pace| pace.wait(now))
    }

    /// Records a call for `identity`.
    pub(super) fn take(&mut self, identity: &RoleIdentity, now: Instant) {
        if let Some(pace) = self.0.get_mut(quota(identity)) {
            pace.take(now);
        }
    }

    /// Records the outcome of a call for `identity` that began at `begun`; `rate` is the node's own.
    pub(super) fn answered(
        &mut self,
        identity: &RoleIdentity,
        (rate, begun): (Rate, Instant),
        error: Option<ErrorClass>,
        now: Instant,
    ) {
        let quota = quota(identity);
        match error {
            Some(ErrorClass::Throttled) => {
                self.0.entry(quota.to_owned()).or_default().throttled(rate, begun, now);
            }
            // STS was not called, not reached, or too busy to look.
            Some(ErrorClass::Retryable | ErrorClass::Refused) => {}
            None | Some(ErrorClass::Denied | ErrorClass::TooLong) => {
                if let Some(pace) = self.0.get_mut(quota) {
                    pace.answered(rate, now);
                }
            }
        }
        self.0.retain(|_, pace| pace.period(now).is_some());
    }

    /// The slowest pace in calls per second, or that of `rate` where none is lowered.
    pub(super) fn slowest(&self, rate: Rate, now: Instant) -> f64 {
        let periods = self.0.values().filter_map(|pace| pace.period(now));
        1.0 / periods.max().unwrap_or(rate.period).as_secs_f64()
    }
}

/// The quota that a call for `identity` counts against: the caller's account, or for a token, which nobody signs, the
/// role's account. So a tenant's own account slows nobody else.
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html>
fn quota(identity: &RoleIdentity) -> &str {
    let by_token = identity.service_account.is_some();
    if by_token { identity.role.account() } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::SessionName;

    const SECOND: Duration = Duration::from_secs(1);
    const RATE: Rate = Rate { burst: 100, period: Duration::from_millis(100) };

    #[tokio::test(start_paused = true)]
    async fn calls_under_way_together_lower_the_pace_once_and_later_ones_to_the_slowest() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for _ in 0..16 {
            pace.throttled(RATE, start, start + SECOND);
        }
        assert_eq!(pace.period(start + SECOND), Some(RATE.period * 2));
        let mut now = start + SECOND;
        let mut periods = Vec::new();
        for _ in 0..10 {
            let wait = pace.wait(now);
            let period = pace.period(now).unwrap();
            assert!(wait >= period * 3 / 4 && wait <= period * 5 / 4, "{wait:?} of {period:?}");
            now += wait;
            assert_eq!(pace.wait(now), Duration::ZERO);
            pace.take(now);
            pace.throttled(RATE, now, now + SECOND / 10);
            now += SECOND / 10;
            periods.push(pace.period(now).unwrap().as_millis());
        }
        assert_eq!(periods, [400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000, 30000]);
    }

    #[tokio::test(start_paused = true)]
    async fn answers_raise_the_pace_and_what_is_old_is_forgotten() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut now = start;
        for _ in 0..10 {
            pace.throttled(RATE, now, now);
        }
        let lowest = pace;
        let mut answers = 0;
        while pace.period(now).is_some() {
            now += pace.wait(now);
            pace.take(now);
            pace.answered(RATE, now);
            answers += 1;
        }
        // A tenth of a call a second each. Jitter may make the time so long that the rest is forgotten.
        let took = now.duration_since(start);
        let all = (98..=100).contains(&answers);
        assert!(
            all || (60..98).contains(&answers) && took >= FORGET_AFTER,
            "{answers} in {took:?}"
        );
        assert!((50..130).contains(&took.as_secs()), "{took:?}");
        let (before, after) = (start + FORGET_AFTER - SECOND, start + FORGET_AFTER);
        assert_eq!((lowest.period(before), lowest.period(after)), (Some(SLOWEST), None));
        // One that is slow anyway is never made faster.
        let slow = Rate { burst: 1, period: SECOND * 60 };
        pace.throttled(slow, now, now);
        assert_eq!(pace.period(now), Some(slow.period));
    }

    #[tokio::test(start_paused = true)]
    async fn accounts_that_are_asked_by_token_are_slowed_apart_and_others_together() {
        let now = Instant::now();
        let identity = |account: &str, role: &str, token: bool| {
            let role = format!("arn:aws:iam::{account}:role/{role}").parse().unwrap();
            let name = SessionName::sanitised("kiam-kiam");
            let mut identity = RoleIdentity::new(role, name, SECOND * 3600);
            identity.service_account = token.then(|| crate::role::AccountName {
                namespace: "shop".into(),
                name: "orders".into(),
            });
            identity
        };
        let (mine, other) = ("123456789012", "999999999999");
        let mut paces = Paces::default();
        let throttled = Some(ErrorClass::Throttled);
        paces.answered(&identity(mine, "a", true), (RATE, now), throttled, now);
        let waits = |paces: &Paces, account, role, token| {
            !paces.wait(&identity(account, role, token), now).is_zero()
        };
        assert!(waits(&paces, mine, "b", true) && !waits(&paces, other, "a", true));
        assert!(!waits(&paces, mine, "a", false));
        assert!((paces.slowest(RATE, now) - 5.0).abs() < 0.01);
        paces.answered(&identity(mine, "a", false), (RATE, now), throttled, now);
        assert!(waits(&paces, other, "b", false));
        let later = now + FORGET_AFTER;
        paces.answered(&identity(mine, "a", false), (RATE, later), None, later);
        assert!(paces.0.is_empty() && (paces.slowest(RATE, later) - 10.0).abs() < 0.01);
    }
}

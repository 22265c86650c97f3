//! The budget of calls to STS, and whose turn it is: pure functions of now.
//!
//! An account's STS answers a few hundred calls a second to all its nodes together, so one tenant must not use
//! them up. Each call takes from the node's bucket. The first call for a key also takes from the buckets of its pod
//! and namespace. The one rule: memory grows with admitted calls, never with requested ones.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{ErrorClass, Limit, schedule};
use crate::{
    rate::{Bucket, Rate},
    role::{Claimant, RoleIdentity},
};

/// A pod has one role at a time, and few ever change it.
const POD: Rate = Rate { burst: 3, period: Duration::from_secs(20) };

/// As many as a node's pods may need when it starts; then one a second, which no rollout exceeds for long.
const NAMESPACE: Rate = Rate { burst: 50, period: Duration::from_secs(1) };

/// The reason why a call waits, and for how long at least.
pub(super) type Delay = (Limit, Duration);

/// The calls that one pod has used.
#[derive(Debug, Default)]
struct Share {
    bucket: Bucket,
    /// Keys of the pod that AWS denied, in a row.
    denied: u32,
    not_before: Option<Instant>,
}

/// The calls that pods and namespaces have used, and whose turn was last.
#[derive(Debug, Default)]
pub(super) struct Shares {
    namespaces: HashMap<Arc<str>, Bucket>,
    pods: HashMap<Arc<str>, Share>,
    last_namespace: Option<Arc<str>>,
    /// The pod that had the last turn, by namespace.
    last_pods: HashMap<Arc<str>, Arc<str>>,
    /// Whether a renewal had the last turn.
    renewed: bool,
}

/// A key that a pod waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) claimant: &'a Claimant,
    pub(super) identity: &'a RoleIdentity,
    /// Whether a request waits for the key now.
    pub(super) asked: bool,
    /// Whether the key has taken from its shares before: this is a retry.
    pub(super) paid: bool,
}

// === impl Share ===

impl Share {
    /// The reason why the pod waits, if it does.
    fn limit(&self, now: Instant) -> Option<Delay> {
        let backoff =
            self.not_before.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let bucket = self.bucket.wait(POD, now);
        if backoff > bucket {
            return Some((Limit::Denied, backoff));
        }
        (!bucket.is_zero()).then_some((Limit::Pod, bucket))
    }

    /// Whether the share can be dropped. Denials are remembered for twice the longest backoff after the last.
    fn is_over(&self, now: Instant) -> bool {
        let memory = schedule::backoff(ErrorClass::Denied, u32::MAX) * 2;
        let forgiven = self.not_before.is_none_or(|at| at + memory <= now);
        self.bucket.is_full(now) && (self.denied == 0 || forgiven)
    }
}

// === impl Shares ===

impl Shares {
    /// The reason why a new key of `claimant` waits now, if it does.
    pub(super) fn limit(&self, claimant: &Claimant, now: Instant) -> Option<Delay> {
        if let Some(limit) = self.pods.get(&claimant.pod).and_then(|share| share.limit(now)) {
            return Some(limit);
        }
        let wait = self.namespaces.get(&claimant.namespace)?.wait(NAMESPACE, now);
        (!wait.is_zero()).then_some((Limit::Namespace, wait))
    }

    /// As [`Shares::limit`]; a retry never waits here.
    pub(super) fn keeps_back(&self, candidate: &Candidate<'_>, now: Instant) -> Option<Delay> {
        if candidate.paid { None } else { self.limit(candidate.claimant, now) }
    }

    /// Whether a new key is next, if there is any.
    pub(super) fn is_turn_of_new(&self) -> bool {
        self.renewed
    }

    /// Records the turn of a renewal.
    pub(super) fn take_renewal(&mut self) {
        self.renewed = true;
    }

    /// The candidate that is next. Namespaces take turns, and so do the pods in each. Pods with a waiting request come
    /// before those without.
    pub(super) fn pick<'a>(
        &self,
        candidates: impl Iterator<Item = Candidate<'a>>,
        now: Instant,
    ) -> Option<Candidate<'a>> {
        candidates
            .filter(|candidate| self.keeps_back(candidate, now).is_none())
            .min_by(|a, b| self.order(a).cmp(&self.order(b)))
    }

    /// The order of a round: by name, starting after the last turn.
    fn order<'a>(&self, candidate: &Candidate<'a>) -> impl Ord + use<'a> {
        let Claimant { namespace, pod } = candidate.claimant;
        let had_turn = self.last_namespace.as_ref().is_some_and(|last| namespace <= last);
        let pod_had_turn = self.last_pods.get(namespace).is_some_and(|last| pod <= last);
        (had_turn, namespace, !candidate.asked, pod_had_turn, pod, candidate.identity)
    }

    /// Records the turn of `candidate`.
    pub(super) fn take(&mut self, candidate: &Candidate<'_>, now: Instant) {
        let Claimant { namespace, pod } = candidate.claimant;
        self.renewed = false;
        self.last_namespace = Some(namespace.clone());
        self.last_pods.insert(namespace.clone(), pod.clone());
        if !candidate.paid {
            self.namespaces.entry(namespace.clone()).or_default().take(NAMESPACE, now);
            self.pods.entry(pod.clone()).or_default().bucket.take(POD, now);
        }
    }

    /// Records AWS's answer to the first call for a new key of `claimant`. One denial may be a typo that is fixed at
    /// once. From the second on the pod backs off.
    pub(super) fn answered(&mut self, claimant: &Claimant, denied: bool, now: Instant) {
        let Some(share) = self.pods.get_mut(&claimant.pod) else { return };
        if !denied {
            share.denied = 0;
            share.not_before = None;
            return;
        }
        share.denied += 1;
        let wait = match share.denied {
            1 => Duration::ZERO,
            denied => schedule::jittered(schedule::backoff(ErrorClass::Denied, denied - 1)),
        };
        share.not_before = Some(now + wait);
    }

    /// Drops shares that are full again. `lives`: whether a namespace has pods that request credentials.
    pub(super) fn forget(&mut self, lives: impl Fn(&Arc<str>) -> bool, now: Instant) {
        self.namespaces.retain(|_, bucket| !bucket.is_full(now));
        self.pods.retain(|_, share| !share.is_over(now));
        self.last_pods.retain(|namespace, _| lives(namespace));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.namespaces.len() + self.pods.len() + self.last_pods.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::SessionName;

    const SECOND: Duration = Duration::from_secs(1);

    fn identity(role: &str) -> RoleIdentity {
        let role = format!("arn:aws:iam::123456789012:role/{role}").parse().unwrap();
        let name = SessionName::sanitised("kiam-kiam");
        RoleIdentity::new(role, name, Duration::from_secs(3600))
    }

    /// What of `claimants`, each waiting for a thing of its own, gets a turn at `now`, in order.
    fn turns(shares: &mut Shares, claimants: &[(&str, &str, bool)], now: Instant) -> Vec<String> {
        let mut queue: Vec<_> = claimants
            .iter()
            .map(|(namespace, pod, asked)| {
                (Claimant::new(namespace, pod), identity(&format!("{namespace}-{pod}")), *asked)
            })
            .collect();
        let mut served = Vec::new();
        loop {
            let candidates = queue.iter().map(|(claimant, identity, asked)| Candidate {
                claimant,
                identity,
                asked: *asked,
                paid: false,
            });
            let Some(candidate) = shares.pick(candidates, now) else { return served };
            shares.take(&candidate, now);
            let Claimant { namespace, pod } = candidate.claimant.clone();
            served.push(format!("{namespace}/{pod}"));
            queue.retain(|(claimant, ..)| {
                (&claimant.namespace, &claimant.pod) != (&namespace, &pod)
            });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn namespaces_take_turns_then_pods_and_those_with_a_request_come_first() {
        let mut shares = Shares::default();
        let queue = [
            ("a", "1", false),
            ("a", "2", false),
            ("a", "3", true),
            ("b", "4", false),
            ("c", "5", false),
            ("c", "6", false),
        ];
        let now = Instant::now();
        let order = ["a/3", "b/4", "c/5", "a/1", "c/6", "a/2"];
        assert_eq!(turns(&mut shares, &queue, now), order);
        // Nobody begins anew: the round goes on after the last.
        assert_eq!(turns(&mut shares, &[queue[0], queue[3]], now), ["b/4", "a/1"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_and_a_namespace_use_up_their_own_share_only() {
        let mut shares = Shares::default();
        let now = Instant::now();
        for _ in 0..POD.burst {
            assert_eq!(turns(&mut shares, &[("a", "1", true)], now), ["a/1"]);
        }
        let limit = |shares: &Shares, claimant: &Claimant| shares.limit(claimant, now);
        let greedy = Claimant::new("a", "1");
        assert_eq!(limit(&shares, &greedy), Some((Limit::Pod, POD.period)));
        assert_eq!(turns(&mut shares, &[("a", "1", true), ("a", "2", false)], now), ["a/2"]);
        let pods: Vec<String> = (0..100).map(|n| format!("new-{n}")).collect();
        let many: Vec<_> = pods.iter().map(|pod| ("a", pod.as_str(), true)).collect();
        let rest = NAMESPACE.burst as usize - POD.burst as usize - 1;
        assert_eq!(turns(&mut shares, &many, now).len(), rest);
        let fresh = Claimant::new("a", "fresh");
        assert_eq!(limit(&shares, &fresh), Some((Limit::Namespace, NAMESPACE.period)));
        assert_eq!(limit(&shares, &Claimant::new("b", "fresh")), None);
        assert_eq!(turns(&mut shares, &many, now + SECOND * 5).len(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_paid_for_is_tried_again_for_nothing() {
        let mut shares = Shares::default();
        let (now, claimant, identity) = (Instant::now(), Claimant::new("a", "1"), identity("x"));
        for _ in 0..100 {
            let again =
                Candidate { claimant: &claimant, identity: &identity, asked: false, paid: true };
            let picked = shares.pick([again].into_iter(), now).unwrap();
            shares.take(&picked, now);
        }
        assert_eq!(shares.limit(&claimant, now), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_is_denied_again_waits_longer_and_a_success_ends_it() {
        let mut shares = Shares::default();
        let (mut now, pod) = (Instant::now(), Claimant::new("a", "1"));
        let mut waits = Vec::new();
        for _ in 0..4 {
            assert_eq!(turns(&mut shares, &[("a", "1", false)], now), ["a/1"]);
            shares.answered(&pod, true, now);
            let wait = shares.limit(&pod, now).map(|(_, wait)| wait).unwrap_or_default();
            waits.push(wait.as_secs());
            now += wait + SECOND * 60;
        }
        assert_eq!(waits[0], 0, "{waits:?}");
        for (wait, around) in waits[1..].iter().zip([15, 30, 60]) {
            assert!((around * 3 / 4 - 1..=around * 5 / 4).contains(wait), "{waits:?}");
        }
        shares.answered(&pod, true, now);
        assert!(matches!(shares.limit(&pod, now), Some((Limit::Denied, _))));
        shares.answered(&pod, false, now);
        assert_eq!(shares.limit(&pod, now), None);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_kept_of_those_that_asked_long_ago() {
        let mut shares = Shares::default();
        let now = Instant::now();
        for n in 0..1000 {
            let (namespace, pod) = (format!("n{}", n % 50), format!("p{n}"));
            turns(&mut shares, &[(&namespace, &pod, true)], now);
            shares.answered(&Claimant::new(&namespace, &pod), n % 2 == 0, now);
        }
        assert!(shares.len() > 1000);
        shares.forget(|_| false, now + SECOND * 60);
        assert_eq!(shares.len(), 500, "those that were denied");
        shares.forget(|_| false, now + SECOND * 1201);
        assert_eq!(shares.len(), 0);
    }
}

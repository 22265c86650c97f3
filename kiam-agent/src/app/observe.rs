//! `--mode=observe`: who asks for the IMDS, and what it would be given.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kiam_common::counters::Reason;
use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info};

use kiam_core::{
    lifecycle::Drain,
    pods::{Pod, PodReader, PodUid},
    policy::{Decision, Refusal, RolePolicy},
};
use kiam_kernel::{
    identity::CgroupPaths,
    intercept::{Observation, Observations},
};

/// How often the kernel's list is read.
const PERIOD: Duration = Duration::from_secs(2);

/// What was seen of each pod: how often, by verdict. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Sightings(Arc<Mutex<BTreeMap<PodUid, Verdicts>>>);

type Verdicts = BTreeMap<&'static str, u64>;

/// What reads the kernel's list and tells of it.
pub(super) struct Observer {
    pub(super) observed: Observations,
    pub(super) cgroups: CgroupPaths,
    pub(super) pods: PodReader,
    pub(super) policy: RolePolicy,
    pub(super) sightings: Sightings,
    pub(super) metrics: Metrics,
}

/// How many pods were seen, by what they would be given.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics(Family<Labels, Gauge>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    would: Would,
}

/// What a pod that asks would be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Would {
    /// Its role.
    Allowed,
    /// Nothing: it has no role.
    NoRole,
    /// Nothing: its role is refused.
    Refused,
    /// It is not known which pod it is, or no longer.
    Unknown,
}

// === impl Sightings ===

impl Sightings {
    /// What was seen of the pod; empty for nothing.
    pub(super) fn of(&self, uid: &PodUid) -> Verdicts {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(uid).cloned().unwrap_or_default()
    }

    /// Replaces everything.
    fn set(&self, all: BTreeMap<PodUid, Verdicts>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = all;
    }
}

// === impl Observer ===

impl Observer {
    /// Reads the list again and again until the drain begins; each pod is told of once for each verdict.
    pub(super) async fn run(self, mut drain: Drain) {
        let mut told = HashSet::new();
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => told = self.look(&told),
            }
        }
    }

    /// Tells of what is not in `told`; returns all that is told of by now.
    fn look(&self, told: &HashSet<(PodUid, Reason)>) -> HashSet<(PodUid, Reason)> {
        let mut all: BTreeMap<PodUid, Verdicts> = BTreeMap::new();
        let mut unknown = 0;
        let mut now = HashSet::new();
        for seen in self.observed.all() {
            let uid = match self.cgroups.pod(seen.cgroup) {
                Ok(uid) => uid,
                Err(error) => {
                    debug!(cgroup = seen.cgroup, %error, "Observed a caller that is no pod");
                    unknown += 1;
                    continue;
                }
            };
            let news = (uid.clone(), seen.verdict);
            if !told.contains(&news) && now.insert(news.clone()) {
                self.tell(&uid, seen);
            }
            now.insert(news);
            *all.entry(uid).or_default().entry(seen.verdict.name()).or_default() += seen.count;
        }
        self.count(all.keys(), unknown);
        self.sightings.set(all);
        now
    }

    fn pod(&self, uid: &PodUid) -> Option<Arc<Pod>> {
        self.pods.by_uid(uid).ok()
    }

    fn tell(&self, uid: &PodUid, seen: Observation) {
        let verdict = seen.verdict.name();
        let Some(pod) = self.pod(uid) else {
            info!(pod.uid = %uid, verdict, "Observed a pod that is not known");
            return;
        };
        match self.policy.decide(&pod) {
            Decision::Allow(identity) => info!(
                pod.name = pod.name, pod.namespace = pod.namespace, pod.iam.role = %identity.role, verdict,
                "Observed a pod that would get its role"
            ),
            Decision::Refuse(reason) => info!(
                pod.name = pod.name, pod.namespace = pod.namespace, verdict, %reason,
                "Observed a pod that would get no role"
            ),
        }
    }

    fn count<'a>(&self, uids: impl Iterator<Item = &'a PodUid>, unknown: i64) {
        let mut counts = HashMap::from([(Would::Unknown, unknown)]);
        for uid in uids {
            let would = match self.pod(uid).map(|pod| self.policy.decide(&pod)) {
                None => Would::Unknown,
                Some(Decision::Allow(_)) => Would::Allowed,
                Some(Decision::Refuse(Refusal::NoRole)) => Would::NoRole,
                Some(Decision::Refuse(_)) => Would::Refused,
            };
            *counts.entry(would).or_default() += 1;
        }
        for would in [Would::Allowed, Would::NoRole, Would::Refused, Would::Unknown] {
            let count = counts.get(&would).copied().unwrap_or_default();
            self.metrics.0.get_or_create(&Labels { would }).set(count);
        }
    }
}

// === impl Metrics ===

impl Metrics {
    /// Adds them to `registry`.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "kiam_observed_pods",
            "Pods that were observed asking for the IMDS, by what they would be given",
            metrics.0.clone(),
        );
        metrics
    }
}

//! `--mode=observe`: reports which pods ask for the IMDS, and what each would get.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kiam_common::counters::VerdictReason;
use prometheus_client::{encoding::EncodeLabelValue, metrics::gauge::Gauge, registry::Registry};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info};

use kiam_core::{
    lifecycle::Drain,
    pods::{Pod, PodReader, PodUid},
    policy::{Decision, Refusal, RolePolicy},
    telemetry::ByLabel,
};
use kiam_kernel::{
    identity::CgroupPaths,
    intercept::{Observation, Observations},
};

/// The time between two reads of the kernel's list.
const PERIOD: Duration = Duration::from_secs(2);

/// The connects that were observed of each pod, by verdict. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Sightings(Arc<Mutex<BTreeMap<PodUid, Verdicts>>>);

type Verdicts = BTreeMap<&'static str, u64>;

/// The task that reads the kernel's list and reports it.
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Observer {
    /// The kernel's list.
    pub observed: Observations,
    /// Whose the cgroups in it are.
    pub cgroups: CgroupPaths,
    pub pods: PodReader,
    pub policy: RolePolicy,
    /// Where the observed connects are recorded.
    pub sightings: Sightings,
    pub metrics: Metrics,
}

/// How many pods were observed, by what they would get.
#[derive(Clone, Debug)]
pub struct Metrics(ByLabel<Would, Gauge>);

/// What a pod that asks would get.
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
    /// How many connects of the pod were observed, by verdict.
    #[must_use]
    pub fn of(&self, uid: &PodUid) -> Verdicts {
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
    /// Reads the list until the drain begins. Each pod is reported once for each verdict.
    pub async fn run(self, mut drain: Drain) {
        let mut reported = HashSet::new();
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => reported = self.scan(&reported),
            }
        }
    }

    /// Reports what is not in `reported`; returns everything that has been reported by now.
    fn scan(
        &self,
        reported: &HashSet<(PodUid, VerdictReason)>,
    ) -> HashSet<(PodUid, VerdictReason)> {
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
            if !reported.contains(&news) && now.insert(news.clone()) {
                self.report(&uid, seen);
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

    fn report(&self, uid: &PodUid, seen: Observation) {
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
                Some(Decision::Refuse(Refusal::NoRole(_))) => Would::NoRole,
                Some(Decision::Refuse(_)) => Would::Refused,
            };
            *counts.entry(would).or_default() += 1;
        }
        for would in [Would::Allowed, Would::NoRole, Would::Refused, Would::Unknown] {
            let count = counts.get(&would).copied().unwrap_or_default();
            self.metrics.0.of(would).set(count);
        }
    }
}

// === impl Metrics ===

impl Metrics {
    /// Adds the metric to `registry`.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        Self(ByLabel::register(
            registry,
            "kiam_observed_pods",
            "Pods that were observed asking for the IMDS, by what they would be given",
            "would",
        ))
    }
}

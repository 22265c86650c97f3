//! Pods that run and have no cgroup below the programs: nothing of theirs is intercepted, and no self-test shows it.
//!
//! That is so where pods are in cgroup v1 and an empty `kubepods` is in v2, or where `--cgroup` names another kubelet's.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::knowledge::Knowledge;
use crate::{
    lifecycle::{Drain, Latch, Readiness},
    pods::{Pod, PodUid},
};

/// How often pods are compared with cgroups.
const PERIOD: Duration = Duration::from_secs(5);
/// How long a pod may have an address and no cgroup: the API hears of a sandbox's end later than the node.
const PATIENCE: Duration = Duration::from_secs(60);

/// Finds them, and takes readiness away where the node's pods are all like that.
pub(super) struct Unseen<S> {
    knowledge: Knowledge,
    /// Whether a pod is this node's.
    serves: S,
    latch: Latch,
    gauge: Gauge<u64, AtomicU64>,
    since: Since,
    warned: bool,
}

/// Since when pods run without a cgroup.
#[derive(Debug, Default)]
struct Since(HashMap<PodUid, Instant>);

// === impl Unseen ===

impl<S: Fn(&Pod) -> bool> Unseen<S> {
    pub(super) fn new(
        knowledge: Knowledge,
        serves: S,
        (registry, readiness): (&mut Registry, &Readiness),
    ) -> Self {
        let latch = readiness.latch("the node's pods below the kernel programs' cgroup");
        latch.set();
        let gauge = Gauge::default();
        registry.register(
            "kiam_sandboxes_unseen",
            "Pods of the node that run and have no cgroup below the kernel programs, so that nothing of theirs is intercepted",
            gauge.clone(),
        );
        Self { knowledge, serves, latch, gauge, since: Since::default(), warned: false }
    }

    /// Until the drain begins.
    pub(super) async fn run(mut self, mut drain: Drain) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => self.compare(Instant::now()),
            }
        }
    }

    fn compare(&mut self, now: Instant) {
        let pods = self.knowledge.pods.all();
        // Whoever has an address has a sandbox.
        let runs = |pod: &Arc<Pod>| {
            pod.live && !pod.host_network && !pod.addresses.is_empty() && (self.serves)(pod)
        };
        let running: Vec<_> = pods.into_iter().filter(runs).collect();
        let has_cgroup = |pod: &Pod| self.knowledge.paths.sandboxes.of(pod).is_some();
        let without = running.iter().filter(|pod| !has_cgroup(pod)).map(|pod| pod.uid.clone());
        let unseen = self.since.overdue(without, now);
        self.gauge.set(unseen.len() as u64);
        let example = running.iter().find(|pod| unseen.contains(&pod.uid));
        if let Some(example) = example.filter(|_| !self.warned) {
            warn!(
                pods = unseen.len(), of = running.len(),
                pod.namespace = %example.namespace, pod.name = %example.name,
                "Pods run without a cgroup below the kernel programs: their IMDS traffic is not intercepted. Are pods in cgroup v1, or is --cgroup another kubelet's?"
            );
        } else if self.warned && unseen.is_empty() {
            info!("All pods that run have a cgroup below the kernel programs");
        }
        self.warned = !unseen.is_empty();
        if !unseen.is_empty() && unseen.len() == running.len() {
            self.latch.clear();
        } else {
            self.latch.set();
        }
    }
}

// === impl Since ===

impl Since {
    /// Those of `without`, all that have no cgroup now, that have had none for too long.
    fn overdue(&mut self, without: impl Iterator<Item = PodUid>, now: Instant) -> HashSet<PodUid> {
        let known = std::mem::take(&mut self.0);
        self.0 = without.map(|uid| (uid.clone(), *known.get(&uid).unwrap_or(&now))).collect();
        let overdue = |(_, since): &(&PodUid, &Instant)| now.duration_since(**since) >= PATIENCE;
        self.0.iter().filter(overdue).map(|(uid, _)| uid.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::fixtures::uid;

    #[test]
    fn a_pod_is_overdue_after_a_while_without_a_cgroup_and_not_once_it_has_one() {
        let (mut since, begun) = (Since::default(), Instant::now());
        let mut after = |seconds, without: &[u32]| {
            let without = without.iter().map(|n| uid(*n));
            let overdue = since.overdue(without, begun + Duration::from_secs(seconds));
            let mut overdue: Vec<_> = (1..9).filter(|n| overdue.contains(&uid(*n))).collect();
            overdue.sort_unstable();
            overdue
        };
        assert!(after(0, &[1, 2]).is_empty());
        assert!(after(30, &[1, 2, 3]).is_empty());
        assert_eq!(after(60, &[1, 3]), [1]);
        assert_eq!(after(90, &[1, 2, 3]), [1, 3]);
        assert_eq!(after(150, &[2]), [2]);
        assert!(after(151, &[]).is_empty());
    }
}

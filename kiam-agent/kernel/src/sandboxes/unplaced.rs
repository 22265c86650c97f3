//! Reports pods that run and that the agent can't place, which no self-test shows.
//!
//! A pod without a cgroup below the programs is not intercepted: pods are in cgroup v1 while an empty `kubepods` is in v2, or
//! `--cgroup` names another kubelet's. A pod whose network namespace is not known is denied: the agent may lack `hostPID`.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{NoListenerReason, SandboxReader, State};
use kiam_core::{
    lifecycle::{Drain, Latch, Readiness},
    pods::{Pod, PodReader, PodUid},
    ticks::ticks,
};

/// The time between two comparisons of pods with cgroups.
const PERIOD: Duration = Duration::from_secs(5);
/// How long a pod may have an address and no place: the API hears of a sandbox's end later than the node.
const PATIENCE: Duration = Duration::from_secs(60);

/// Finds those pods. The agent is not ready while all of the node's pods are among them.
pub struct Unplaced<S> {
    pods: PodReader,
    sandboxes: SandboxReader,
    /// Whether a pod is this node's.
    serves: S,
    latch: Latch,
    gauge: Gauge<u64, AtomicU64>,
    since: Since,
    warned: bool,
}

/// Since when pods run without a place.
#[derive(Debug, Default)]
struct Since(HashMap<PodUid, Instant>);

// === impl Unplaced ===

impl<S: Fn(&Pod) -> bool> Unplaced<S> {
    /// Compares the `pods` that `serves` picks with what is known of their `sandboxes`.
    pub fn new(
        pods: PodReader,
        sandboxes: SandboxReader,
        serves: S,
        registry: &mut Registry,
        readiness: &Readiness,
    ) -> Self {
        let latch = readiness.latch("cgroups and network namespaces of the node's pods");
        latch.set();
        let gauge = Gauge::default();
        registry.register(
            "kiam_sandboxes_unseen",
            "Pods of the node that run and have no cgroup below the kernel programs, or no known network namespace",
            gauge.clone(),
        );
        Self { pods, sandboxes, serves, latch, gauge, since: Since::default(), warned: false }
    }

    /// Runs until the drain begins.
    pub async fn run(mut self, mut drain: Drain) {
        let mut ticks = ticks(PERIOD);
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => self.compare(Instant::now()),
            }
        }
    }

    fn compare(&mut self, now: Instant) {
        let pods = self.pods.all();
        // Whoever has an address has a sandbox.
        let runs = |pod: &Arc<Pod>| {
            pod.live && !pod.host_network && !pod.addresses.is_empty() && (self.serves)(pod)
        };
        let running: Vec<_> = pods.into_iter().filter(runs).collect();
        let sandboxes = &self.sandboxes;
        let is_placed = |pod: &Pod| match sandboxes.of(pod) {
            None => false,
            Some(State::Without(reason)) => reason == NoListenerReason::Kernel,
            Some(_) => true,
        };
        let without = running.iter().filter(|pod| !is_placed(pod)).map(|pod| pod.uid.clone());
        let unplaced = self.since.overdue(without, now);
        self.gauge.set(unplaced.len() as u64);
        let example = running.iter().find(|pod| unplaced.contains(&pod.uid));
        if let Some(example) = example.filter(|_| !self.warned) {
            let why = match sandboxes.of(example) {
                None => "no cgroup below the kernel programs, so that nothing is intercepted: are pods in cgroup v1, or is --cgroup another kubelet's?".to_owned(),
                Some(state) => format!("denied: {state}"),
            };
            warn!(
                pods = unplaced.len(), of = running.len(),
                pod.namespace = %example.namespace, pod.name = %example.name, why,
                "Pods run that the agent can't place"
            );
        } else if self.warned && unplaced.is_empty() {
            info!("All pods that run are placed");
        }
        self.warned = !unplaced.is_empty();
        if !unplaced.is_empty() && unplaced.len() == running.len() {
            self.latch.clear();
        } else {
            self.latch.set();
        }
    }
}

// === impl Since ===

impl Since {
    /// Those of `without`, the pods that have no place now, that have had none for too long.
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
    use kiam_core::pods::fixtures::uid;

    #[test]
    fn a_pod_is_overdue_after_a_while_without_a_place_and_not_once_it_has_one() {
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

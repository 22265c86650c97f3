//! Pods that ran before the kernel programs were attached, and so may hold the node's credentials.
//!
//! After a boot, a first roll-out or an uninstall, pods reach the real metadata service until the agent attaches its
//! programs, and SDKs keep what they got there until it expires.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, info, warn};

use super::{explanation::time, knowledge::Knowledge};
use crate::{config::Config, imds::NodeRole};
use kiam_core::{
    blocking::{self, Blocking},
    clock::Clock,
    lifecycle::Drain,
    pods::{Pod, PodUid},
};
use kiam_kernel::{
    intercept::{self, HostNetworkPods, older_pods, since_boot},
    sys::Cgroup,
};

/// How often it is looked whether there is something to search for, and which of the pods that were found are left.
const PERIOD: Duration = Duration::from_secs(5);
/// For how long an instance's credentials are valid at most. AWS documents no number: IMDS hands them out with up to 6 h 36 min
/// left, renews them well before that, and a role's maximum session duration does not apply to them.
const LIFETIME: Duration = Duration::from_secs(7 * 3600);
/// The end is rounded up to whole minutes, so that every agent that computes it says the same.
const MINUTE: u64 = 60;

/// Which pods those are, as far as they have been found. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Older(Arc<Mutex<Found>>);

#[derive(Debug, Default)]
struct Found {
    pods: HashSet<PodUid>,
    /// When the last of their credentials have expired.
    until: Option<SystemTime>,
}

/// Pods that may have the node's credentials anyhow.
#[derive(Clone, Debug)]
pub(super) struct Entitled {
    host_network: bool,
    node_roles: Vec<NodeRole>,
}

/// Finds them.
pub(super) struct Search<S> {
    pub(super) knowledge: Knowledge,
    /// Whether a pod is this node's.
    pub(super) serves: S,
    pub(super) clock: Clock,
    pub(super) config: intercept::Config,
    /// Since when pods are intercepted.
    pub(super) attached: watch::Receiver<Option<Duration>>,
    pub(super) gauge: Gauge<u64, AtomicU64>,
}

// === impl Older ===

impl Older {
    /// Until when the pod may hold the node's credentials; `None` for pods that can't.
    pub(super) fn until(&self, pod: &Pod) -> Option<SystemTime> {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_found = |uid: &PodUid| found.pods.contains(uid);
        // A static pod's cgroup is named by its hash.
        let is_older = is_found(pod.config_hash.as_ref().unwrap_or(&pod.uid));
        found.until.filter(|_| pod.live && is_older)
    }

    fn set(&self, pods: HashSet<PodUid>, until: Option<SystemTime>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Found { pods, until };
    }

    fn is_empty(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pods.is_empty()
    }
}

// === impl Entitled ===

impl Entitled {
    pub(super) fn new(config: &Config) -> Self {
        let passes = |it: &intercept::Config| it.host_network == HostNetworkPods::Pass;
        let host_network = config.intercept.as_ref().is_some_and(passes);
        Self { host_network, node_roles: config.imds.node_roles.clone() }
    }

    /// Whether `pod` gets the node's credentials whenever it asks.
    pub(super) fn includes(&self, pod: &Pod) -> bool {
        (self.host_network && pod.host_network)
            || self.node_roles.iter().any(|role| role.names(pod))
    }
}

/// The metric of how many there are.
pub(super) fn gauge(registry: &mut Registry) -> Gauge<u64, AtomicU64> {
    let gauge = Gauge::default();
    registry.register(
        "kiam_intercept_older_pods",
        "Pods of the node that ran before the kernel programs were attached, and may still hold the node's credentials",
        gauge.clone(),
    );
    gauge
}

// === impl Search ===

impl<S: Fn(&Pod) -> bool> Search<S> {
    /// Until the drain begins.
    pub(super) async fn run(mut self, entitled: Entitled, mut drain: Drain) {
        let mut ticks = interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What the last complete search was for.
        let mut searched = None;
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => {}
                // Its sender goes with the agent.
                Ok(()) = self.attached.changed() => {}
            }
            let attached = *self.attached.borrow_and_update();
            let due = attached.filter(|attached| since_boot() < *attached + LIFETIME);
            match due {
                None if !self.knowledge.older.is_empty() => {
                    info!("Credentials of the node that pods may have held have expired");
                    self.knowledge.older.set(HashSet::new(), None);
                }
                Some(attached) if searched != due && self.search(attached).await => searched = due,
                _ => {}
            }
            self.count(&entitled);
        }
    }

    /// Whether all pods were searched.
    async fn search(&self, attached: Duration) -> bool {
        let config = self.config.clone();
        let search = move |token: &Blocking| {
            let cgroup = Cgroup::open(token, config.cgroup.as_deref())?;
            older_pods(token, &cgroup, &config.bpffs, attached)
        };
        let found = match blocking::spawn(search).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                warn!(%error, "Pods that are older than the kernel programs can't be searched for; trying again");
                return false;
            }
            // The runtime ends.
            Err(_) => return false,
        };
        let until = end(self.clock.now(), since_boot(), attached);
        if found.pods.is_empty() {
            debug!("No pod is older than the kernel programs");
        } else {
            info!(
                pods = found.pods.len(),
                until = time(until),
                "Pods ran before the kernel programs were attached, and may hold the node's credentials"
            );
        }
        self.knowledge.older.set(found.pods, Some(until));
        found.complete
    }

    fn count(&self, entitled: &Entitled) {
        let Knowledge { pods, older, .. } = &self.knowledge;
        let counts = |pod: &Arc<Pod>| {
            (self.serves)(pod) && !entitled.includes(pod) && older.until(pod).is_some()
        };
        self.gauge.set(pods.all().iter().filter(|pod| counts(pod)).count() as u64);
    }
}

/// When credentials have expired that were got before `attached`, a time since boot as `since_boot` is.
fn end(now: SystemTime, since_boot: Duration, attached: Duration) -> SystemTime {
    let left = (attached + LIFETIME).saturating_sub(since_boot);
    let end = (now + left).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let minutes = end.as_secs().div_ceil(MINUTE);
    SystemTime::UNIX_EPOCH + Duration::from_secs(minutes * MINUTE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::pods::fixtures;

    #[test]
    fn agents_that_compute_the_end_at_different_times_say_the_same() {
        let at = |wall: u64, boot: u64| {
            let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(wall);
            end(wall, Duration::from_secs(boot), Duration::from_secs(100))
        };
        assert_eq!(at(1_767_225_600, 110), at(1_767_225_600 + 3600, 110 + 3600));
        let until = at(1_767_225_600, 100).duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(until.as_secs(), 1_767_225_600 + 7 * 3600);
    }

    #[test]
    fn static_pods_are_known_by_their_hash_and_ended_pods_hold_nothing() {
        let older = Older::default();
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        let found = HashSet::from([fixtures::uid(1), fixtures::config_hash(2)]);
        older.set(found, Some(until));
        let is_static = Pod::test(2).mirroring("kube-system", fixtures::config_hash(2));
        assert_eq!(older.until(&Pod::test(1)), Some(until));
        assert_eq!(older.until(&is_static), Some(until));
        for pod in [Pod::test(1).over(), Pod::test(2), Pod::test(3)] {
            assert_eq!(older.until(&pod), None, "{pod:?}");
        }
    }
}

//! Finds pods that ran before the kernel programs were attached, and so may hold the node's credentials.
//!
//! After a boot, a first roll-out or an uninstall, pods reach the real metadata service until the agent attaches its
//! programs, and SDKs cache the credentials that they got there until those expire.

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

use crate::imds::NodeRole;
use kiam_core::{
    blocking::{self, Blocking},
    clock::Clock,
    lifecycle::Drain,
    pods::{Pod, PodReader, PodUid},
};
use kiam_kernel::{
    intercept::{self, older_pods, since_boot},
    sys::Cgroup,
};

/// The time between two checks of whether a search is due, and of which pods that were found are left.
const PERIOD: Duration = Duration::from_secs(5);
/// For how long an instance's credentials are valid at most. AWS documents no number: IMDS hands them out with up to 6 h 36 min
/// left, renews them well before that, and a role's maximum session duration does not apply to them.
const LIFETIME: Duration = Duration::from_secs(7 * 3600);
/// The end is rounded up to whole minutes, so that every agent that computes it says the same.
const MINUTE: u64 = 60;

/// The pods that may hold the node's credentials and are not entitled to them, as far as they have been found. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Exposure {
    entitlement: Entitlement,
    pods: Arc<Mutex<Pods>>,
}

#[derive(Debug, Default)]
struct Pods {
    uids: HashSet<PodUid>,
    /// When the last of their credentials have expired.
    until: Option<SystemTime>,
}

/// The pods that get the node's credentials by the flags.
#[derive(Clone, Debug, Default)]
pub struct Entitlement {
    /// `--host-network-pods=pass`.
    pub passes_host_network: bool,
    /// `--node-role`.
    pub node_roles: Vec<NodeRole>,
}

/// Why a pod gets the node's credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grounds {
    /// `--node-role` names it.
    NodeRole,
    /// It is on the node's network, and `--host-network-pods=pass`.
    HostNetwork,
}

/// The task that finds those pods.
pub struct Search<S> {
    /// The pods that are known.
    pub pods: PodReader,
    /// Where those that are found are recorded.
    pub exposure: Exposure,
    /// Whether a pod is this node's.
    pub serves: S,
    /// The time until which they are exposed.
    pub clock: Clock,
    /// Where the pods' cgroup and the pins are.
    pub config: intercept::Config,
    /// Since when pods are intercepted.
    pub attached: watch::Receiver<Option<Duration>>,
    /// How many there are.
    pub gauge: Gauge<u64, AtomicU64>,
}

// === impl Exposure ===

impl Exposure {
    /// No pods yet.
    #[must_use]
    pub fn new(entitlement: Entitlement) -> Self {
        Self { entitlement, pods: Arc::default() }
    }

    /// The pods that are entitled to the node's credentials.
    #[must_use]
    pub fn entitlement(&self) -> &Entitlement {
        &self.entitlement
    }

    /// Until when the pod may hold the node's credentials; `None` for pods that can't, or are entitled to them.
    #[must_use]
    pub fn until(&self, pod: &Pod) -> Option<SystemTime> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let is_found = |uid: &PodUid| pods.uids.contains(uid);
        // A static pod's cgroup is named by its hash.
        let is_older = is_found(pod.config_hash.as_ref().unwrap_or(&pod.uid));
        pods.until.filter(|_| pod.live && is_older && self.entitlement.of(pod).is_none())
    }

    fn set(&self, uids: HashSet<PodUid>, until: Option<SystemTime>) {
        *self.pods.lock().unwrap_or_else(PoisonError::into_inner) = Pods { uids, until };
    }

    fn is_empty(&self) -> bool {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).uids.is_empty()
    }
}

// === impl Entitlement ===

impl Entitlement {
    /// Why `pod` gets the node's credentials whenever it asks; `None` if it does not.
    #[must_use]
    pub fn of(&self, pod: &Pod) -> Option<Grounds> {
        if self.node_roles.iter().any(|role| role.names(pod)) {
            return Some(Grounds::NodeRole);
        }
        (self.passes_host_network && pod.host_network).then_some(Grounds::HostNetwork)
    }
}

/// The metric of how many exposed pods there are.
pub fn gauge(registry: &mut Registry) -> Gauge<u64, AtomicU64> {
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
    /// Searches until the drain begins.
    pub async fn run(mut self, mut drain: Drain) {
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
                None if !self.exposure.is_empty() => {
                    info!("The node's credentials that pods may have held have expired");
                    self.exposure.set(HashSet::new(), None);
                }
                Some(attached) if searched != due && self.search(attached).await => searched = due,
                _ => {}
            }
            self.count();
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
                until = %humantime::format_rfc3339_seconds(until),
                "Pods ran before the kernel programs were attached, and may hold the node's credentials"
            );
        }
        self.exposure.set(found.pods, Some(until));
        found.complete
    }

    fn count(&self) {
        let counts = |pod: &Arc<Pod>| (self.serves)(pod) && self.exposure.until(pod).is_some();
        self.gauge.set(self.pods.all().iter().filter(|pod| counts(pod)).count() as u64);
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
        let exposure = Exposure::default();
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        let found = HashSet::from([fixtures::uid(1), fixtures::config_hash(2)]);
        exposure.set(found, Some(until));
        let is_static = Pod::test(2).mirroring("kube-system", fixtures::config_hash(2));
        assert_eq!(exposure.until(&Pod::test(1)), Some(until));
        assert_eq!(exposure.until(&is_static), Some(until));
        for pod in [Pod::test(1).over(), Pod::test(2), Pod::test(3)] {
            assert_eq!(exposure.until(&pod), None, "{pod:?}");
        }
    }
}

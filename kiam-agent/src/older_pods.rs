//! Finds pods that ran before the kernel programs were attached, and so may hold the node's credentials.
//!
//! After a boot, a first roll-out or an uninstall, pods reach the real metadata service until the agent attaches its
//! programs, and SDKs cache the credentials that they got there until those expire.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::cluster::{Age, Exposed};
use kiam_core::{
    blocking::{self, Blocking},
    clock::Clock,
    lifecycle::Drain,
    pods::{Pod, PodReader},
    telemetry::register,
    ticks::ticks,
};
use kiam_kernel::{
    intercept::{self, InterceptedSince, OlderPods, OlderSearch},
    sys::{Cgroup, since_boot},
};
use kiam_requests::imds::NodeRole;

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
    pods: Arc<Mutex<SearchResult>>,
}

#[derive(Debug, Default)]
struct SearchResult {
    pods: OlderPods,
    /// Whether pods' packets come to the real service past the node's routing rules, as far as that is known.
    bypassed: Option<watch::Receiver<bool>>,
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
    pub intercepted: watch::Receiver<Option<InterceptedSince>>,
    /// How many there are.
    pub gauges: Gauges,
}

/// The numbers of pods that may hold the node's credentials.
#[derive(Clone, Debug)]
pub struct Gauges {
    older: Gauge<u64, AtomicU64>,
    unknown: Gauge<u64, AtomicU64>,
}

/// What is still to search.
#[derive(Debug, Default)]
struct Progress {
    /// Since when pods were intercepted at the last search, in part or completely.
    since: Option<InterceptedSince>,
    /// `None` once all pods were searched.
    search: Option<OlderSearch>,
    /// Whether it was logged that pods can't be searched.
    failure_logged: bool,
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
    pub fn of(&self, pod: &Pod) -> Option<Exposed> {
        let found = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        let until = found.until.filter(|_| pod.live && self.entitlement.of(pod).is_none())?;
        // A static pod's cgroup is named by its hash.
        let uid = pod.config_hash.as_ref().unwrap_or(&pod.uid);
        let bypassed = found.bypassed.as_ref().is_some_and(|bypassed| *bypassed.borrow());
        // The rules let the node's own packets pass.
        let routing_counts = !pod.host_network && !bypassed;
        let OlderPods { older, routed, unknown } = &found.pods;
        if older.contains(uid) || (!routing_counts && routed.contains(uid)) {
            return Some(Exposed { until, age: Age::Older });
        }
        unknown.contains(uid).then_some(Exposed { until, age: Age::Unknown })
    }

    /// Whether the pod is known to have run before it was intercepted.
    #[must_use]
    pub fn is_certain(&self, pod: &Pod) -> bool {
        self.of(pod).is_some_and(|exposed| exposed.age == Age::Older)
    }

    /// Counts pods that routing rules kept from the real service, too, while packets are found to pass the rules.
    pub fn follow(&self, bypassed: watch::Receiver<bool>) {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).bypassed = Some(bypassed);
    }

    fn set(&self, pods: OlderPods, until: Option<SystemTime>) {
        let mut found = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        (found.pods, found.until) = (pods, until);
    }

    fn has_ended(&self) -> bool {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).until.is_none()
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

// === impl Gauges ===

impl Gauges {
    /// Registers the gauges.
    pub fn register(registry: &mut Registry) -> Self {
        Self {
            older: register(
                registry,
                "kiam_intercept_older_pods",
                "Pods of the node that ran before the kernel programs were attached, and may still hold the node's credentials",
            ),
            unknown: register(
                registry,
                "kiam_intercept_pods_of_unknown_age",
                "Pods of the node of which the agent can't tell whether they ran before the kernel programs were attached",
            ),
        }
    }
}

// === impl Search ===

impl<S: Fn(&Pod) -> bool> Search<S> {
    /// Searches until the drain begins.
    pub async fn run(mut self, mut drain: Drain) {
        let mut ticks = ticks(PERIOD);
        let mut progress = Progress::default();
        loop {
            tokio::select! {
                () = drain.started() => return,
                _ = ticks.tick() => {}
                // Its sender goes with the agent.
                Ok(()) = self.intercepted.changed() => {}
            }
            let since = *self.intercepted.borrow_and_update();
            let due = since.filter(|since| since_boot() < since.programs + LIFETIME);
            if due != progress.since {
                let search = due.map(OlderSearch::new);
                progress = Progress { since: due, search, failure_logged: false };
            }
            match progress.since {
                None if !self.exposure.has_ended() => {
                    info!("The node's credentials that pods may have held have expired");
                    self.exposure.set(OlderPods::default(), None);
                }
                Some(since) => self.go_on(since, &mut progress).await,
                None => {}
            }
            self.count();
        }
    }

    /// Searches the pods that were not searched yet.
    async fn go_on(&self, since: InterceptedSince, progress: &mut Progress) {
        let Some(mut search) = progress.search.take() else { return };
        let config = self.config.clone();
        let work = move |token: &Blocking| {
            let cgroup = Cgroup::open(token, config.cgroup.as_deref());
            let done = cgroup.and_then(|cgroup| search.go_on(token, &cgroup, &config.bpffs));
            (search, done)
        };
        // Fails when the runtime shuts down, or the search panics.
        let Ok((search, done)) = blocking::spawn(work).await else {
            warn!(
                "The search for pods that are older than the kernel programs ended early; starting again"
            );
            progress.search = Some(OlderSearch::new(since));
            return;
        };
        let until = end(self.clock.now(), since_boot(), since.programs);
        let found = search.found().clone();
        self.exposure.set(found.clone(), Some(until));
        match done {
            Ok(true) => report(&found, until),
            Ok(false) => progress.search = Some(search),
            Err(error) => {
                if !std::mem::replace(&mut progress.failure_logged, true) {
                    warn!(%error, "Pods that are older than the kernel programs can't be searched for; trying again");
                }
                progress.search = Some(search);
            }
        }
    }

    fn count(&self) {
        let (mut sure, mut unknown) = (0, 0);
        for pod in self.pods.all().iter().filter(|pod| (self.serves)(pod)) {
            match self.exposure.of(pod).map(|exposed| exposed.age) {
                Some(Age::Older) => sure += 1,
                Some(Age::Unknown) => unknown += 1,
                None => {}
            }
        }
        self.gauges.older.set(sure);
        self.gauges.unknown.set(unknown);
    }
}

fn report(found: &OlderPods, until: SystemTime) {
    let OlderPods { older, routed, unknown } = found;
    if !older.is_empty() {
        info!(
            pods = older.len(),
            until = %humantime::format_rfc3339_seconds(until),
            "Pods ran before the kernel programs were attached, and may hold the node's credentials"
        );
    }
    if !routed.is_empty() {
        info!(
            pods = routed.len(),
            "Pods ran before the kernel programs were attached, and the boot guard kept those with a network of their own from the node's credentials"
        );
    }
    if !unknown.is_empty() {
        warn!(
            pods = unknown.len(),
            until = %humantime::format_rfc3339_seconds(until),
            "Pods whose processes can't be read may have run before the kernel programs were attached"
        );
    }
    if found == &OlderPods::default() {
        debug!("No pod is older than the kernel programs");
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

    fn older(number: u32) -> OlderPods {
        OlderPods { older: [fixtures::uid(number)].into(), ..OlderPods::default() }
    }

    #[test]
    fn static_pods_are_known_by_their_hash_and_ended_pods_hold_nothing() {
        let known = Exposure::default();
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        let mut found = older(1);
        found.older.insert(fixtures::config_hash(2));
        known.set(found, Some(until));
        let is_static = Pod::test(2).mirroring("kube-system", fixtures::config_hash(2));
        let exposed = Some(Exposed { until, age: Age::Older });
        assert_eq!(known.of(&Pod::test(1)), exposed);
        assert_eq!(known.of(&is_static), exposed);
        for pod in [Pod::test(1).over(), Pod::test(2), Pod::test(3)] {
            assert_eq!(known.of(&pod), None, "{pod:?}");
        }
    }

    #[test]
    fn an_unknown_age_shows_and_is_no_reason_to_evict() {
        let known = Exposure::default();
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        let unknown = [fixtures::uid(1), fixtures::uid(2)].into();
        known.set(OlderPods { unknown, ..older(2) }, Some(until));
        let exposed = |age| Some(Exposed { until, age });
        assert_eq!(known.of(&Pod::test(1)), exposed(Age::Unknown));
        assert_eq!(known.of(&Pod::test(2)), exposed(Age::Older));
        assert_eq!([1, 2].map(|number| known.is_certain(&Pod::test(number))), [false, true]);
    }

    #[test]
    fn routing_rules_count_for_pods_with_a_network_of_their_own_while_they_hold() {
        let known = Exposure::default();
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(60);
        let routed = [fixtures::uid(1), fixtures::uid(2)].into();
        known.set(OlderPods { routed, ..OlderPods::default() }, Some(until));
        let host = Pod { host_network: true, ..Pod::test(2) };
        let exposed = || [&Pod::test(1), &host].map(|pod| known.is_certain(pod));
        assert_eq!(exposed(), [false, true]);
        let (bypassed, receiver) = watch::channel(false);
        known.follow(receiver);
        assert_eq!(exposed(), [false, true]);
        bypassed.send_replace(true);
        assert_eq!(exposed(), [true, true], "pods' packets pass the rules by");
    }
}

//! Publishes the wanted set, and keeps it up to date change by change.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tokio::{
    sync::watch,
    time::{self, Instant},
};
use tracing::info;

use super::{Decision, RolePolicy};
use crate::{
    lifecycle::Drain,
    pods::{Changed, Pod, PodUid, Position},
    role::{Claimant, RoleIdentity, Sessions, WantedRoles},
};

/// The pause after following changes, in multiples of the time that it took.
const PAUSE_PER_WORK: u32 = 9;

/// Logs what sessions of the pods' own cost, once it is known what is wanted.
pub async fn report_sessions(mut wanted: watch::Receiver<WantedRoles>) {
    if let Ok(first) = wanted.wait_for(|wanted| !wanted.is_empty()).await {
        info!(
            "Session names, source identities or tags are the pods' own: {}",
            Sessions::of(&first)
        );
    }
}

/// Publishes the wanted roles whenever a record changes, until the drain begins.
///
/// The decision about a pod is made again where its record, its namespace's or its ServiceAccount's has changed. All
/// decisions are made from the current records, and where changes were missed, all are made again: no change can be lost.
pub async fn publish_wanted(
    policy: RolePolicy,
    serves: impl Fn(&Pod) -> bool,
    wanted: watch::Sender<WantedRoles>,
    mut drain: Drain,
) {
    let mut changes = policy.reader.changes();
    let mut publisher = Publisher::new(policy, serves);
    loop {
        let begun = Instant::now();
        changes.mark_unchanged();
        publisher.follow(&wanted);
        // A tenant that changes objects in a loop gets no more of a processor than this.
        let pause = begun.elapsed() * PAUSE_PER_WORK;
        let changed = async {
            time::sleep(pause).await;
            changes.changed().await
        };
        tokio::select! {
            changed = changed => if changed.is_err() { break },
            () = drain.started() => break,
        }
    }
}

/// The state of the published set.
struct Publisher<F> {
    policy: RolePolicy,
    serves: F,
    position: Position,
    pods: HashMap<PodUid, KnownPod>,
    by_namespace: HashMap<Arc<str>, HashSet<PodUid>>,
}

/// A pod, as far as the published set depends on it.
struct KnownPod {
    /// The pod in that set, and the namespace's name.
    claimant: Claimant,
    /// The identity that the pod requests and is allowed.
    identity: Option<Arc<RoleIdentity>>,
}

/// A pod that is to be removed from an identity's, or added.
struct Difference {
    claimant: Claimant,
    before: Option<Arc<RoleIdentity>>,
    after: Option<Arc<RoleIdentity>>,
}

// === impl Publisher ===

impl<F: Fn(&Pod) -> bool> Publisher<F> {
    fn new(policy: RolePolicy, serves: F) -> Self {
        let (pods, by_namespace) = (HashMap::new(), HashMap::new());
        Self { policy, serves, position: Position::default(), pods, by_namespace }
    }

    /// Brings the published set up to date.
    fn follow(&mut self, wanted: &watch::Sender<WantedRoles>) {
        let pods = match self.policy.reader.changed_since(&mut self.position) {
            Some(changes) => self.concerned(changes),
            None => self.all(),
        };
        let differences: Vec<_> = pods.iter().filter_map(|uid| self.update(uid)).collect();
        if differences.is_empty() {
            return;
        }
        // Whoever holds the last set keeps it, and this one is a copy then.
        wanted.send_modify(|wanted| apply(Arc::make_mut(wanted), differences));
    }

    /// The pods that `changes` concern.
    fn concerned(&self, changes: Vec<Changed>) -> HashSet<PodUid> {
        let mut pods = HashSet::new();
        for change in changes {
            let namespace = match change {
                Changed::Pod(uid) => {
                    pods.insert(uid);
                    continue;
                }
                Changed::Namespace(name) => name.into(),
                // Rare, and few pods of its namespace have another account.
                Changed::Account(name) => name.namespace,
            };
            pods.extend(self.by_namespace.get(&namespace).into_iter().flatten().cloned());
        }
        pods
    }

    /// All pods, those that are gone included.
    fn all(&self) -> HashSet<PodUid> {
        let known = self.policy.reader.all();
        self.policy.standings.retain(|uid| self.policy.reader.record(uid).is_some());
        known.iter().map(|pod| &pod.uid).chain(self.pods.keys()).cloned().collect()
    }

    /// Decides about the pod of this UID by the current records.
    fn update(&mut self, uid: &PodUid) -> Option<Difference> {
        let Some(pod) = self.policy.reader.record(uid) else {
            self.policy.standings.forget(uid);
            return self.remove(uid);
        };
        if !pod.live || !(self.serves)(&pod) {
            return self.remove(uid);
        }
        let after = match self.policy.standing(&pod).decision() {
            Decision::Allow(identity) => Some(identity.clone()),
            Decision::Refuse(_) => None,
        };
        let known = self.pods.entry(uid.clone()).or_insert_with(|| {
            let claimant = Claimant::new(&pod.namespace, &uid.to_string());
            let namespace = self.by_namespace.entry(claimant.namespace.clone());
            namespace.or_default().insert(uid.clone());
            KnownPod { claimant, identity: None }
        });
        if known.identity == after {
            return None;
        }
        let before = std::mem::replace(&mut known.identity, after.clone());
        Some(Difference { claimant: known.claimant.clone(), before, after })
    }

    fn remove(&mut self, uid: &PodUid) -> Option<Difference> {
        let KnownPod { claimant, identity } = self.pods.remove(uid)?;
        if let Some(pods) = self.by_namespace.get_mut(&claimant.namespace) {
            pods.remove(uid);
            if pods.is_empty() {
                self.by_namespace.remove(&claimant.namespace);
            }
        }
        let before = Some(identity?);
        Some(Difference { claimant, before, after: None })
    }
}

fn apply(
    wanted: &mut BTreeMap<RoleIdentity, BTreeSet<Claimant>>,
    differences: impl IntoIterator<Item = Difference>,
) {
    for Difference { claimant, before, after } in differences {
        if let Some(before) = before
            && let Some(claimants) = wanted.get_mut(&*before)
        {
            claimants.remove(&claimant);
            if claimants.is_empty() {
                wanted.remove(&*before);
            }
        }
        if let Some(after) = after {
            wanted.entry(RoleIdentity::clone(&after)).or_default().insert(claimant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pods::{Annotation, Namespace, PodIndex, ServiceAccount},
        policy::Config,
        role::{AccountName, RoleResolver, Source},
    };

    const ROLE: &str = "arn:aws:iam::123456789012:role/";

    fn policy(source: Source) -> (PodIndex, RolePolicy) {
        let (index, reader) = PodIndex::new();
        let base = RoleResolver::new(Some(ROLE.parse().unwrap()));
        (index, RolePolicy::new(Config { source, ..Config::new(base) }, reader))
    }

    fn namespace(name: u8, version: u64, permitted: Option<&str>) -> Namespace {
        Namespace {
            resource_version: Some(version),
            permitted: permitted.map(Annotation::from),
            ..Namespace::new(&format!("namespace-{name}"))
        }
    }

    fn pod(n: u32, version: u64, role: Option<&str>) -> Pod {
        Pod {
            namespace: format!("namespace-{}", n % 3),
            role: role.map(Annotation::from),
            service_account: format!("account-{}", n % 2),
            ..Pod::test(n).version(version)
        }
    }

    fn account(namespace: u8, name: u8, version: u64, role: &str) -> ServiceAccount {
        ServiceAccount {
            name: AccountName::new(&format!("namespace-{namespace}"), &format!("account-{name}")),
            resource_version: Some(version),
            role: Some(format!("{ROLE}{role}").as_str().into()),
        }
    }

    /// Changes the records at random, so that each kind of change is among them.
    fn change(index: &PodIndex, rng: &mut fastrand::Rng, version: u64) {
        let (n, place) = (rng.u32(0..20), rng.u8(0..3));
        let role = rng.choice([None, Some("reader"), Some("writer"), Some("no role")]).unwrap();
        let permitted = rng.choice([None, Some(".*reader"), Some(".*"), Some("(")]).unwrap();
        match rng.u8(0..12) {
            0..5 => index.apply(pod(n, version, role)),
            5 => index.apply(pod(n, version, role).over()),
            6 => index.delete(&pod(n, version, role)),
            7..9 => index.apply(namespace(place, version, permitted)),
            9 => index.delete(&namespace(place, version, None)),
            10 => index.apply(account(place, rng.u8(0..2), version, "reader")),
            _ => {
                let pods = (0..rng.u32(0..20)).map(|n| pod(n, version, role)).collect();
                index.reset(pods, Some(version));
            }
        }
    }

    #[test]
    fn what_is_kept_up_to_date_is_what_all_records_together_say() {
        for seed in 0..60 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let source = if rng.bool() { Source::Node } else { Source::WebIdentity };
            let (index, policy) = policy(source);
            let serves = |pod: &Pod| !pod.name.ends_with('7');
            let mut publisher = Publisher::new(policy.clone(), serves);
            let wanted = watch::Sender::new(WantedRoles::default());
            for version in 1..100 {
                // Now and then more than the log keeps.
                let changes = if rng.u8(..) == 0 { 1_500 } else { rng.u64(0..4) };
                for n in 0..changes {
                    change(&index, &mut rng, version * 10_000 + n);
                }
                let held = rng.bool().then(|| wanted.borrow().clone());
                let copy = held.as_deref().cloned();
                publisher.follow(&wanted);
                assert_eq!(*wanted.borrow(), policy.wanted(&serves), "seed {seed}, {version}");
                assert_eq!(held.as_deref(), copy.as_ref(), "what somebody holds stays as it was");
                for pod in policy.reader.all() {
                    let standing = policy.standing(&pod);
                    assert_eq!(*standing.decision(), policy.decide(&pod), "seed {seed}: {pod:?}");
                }
            }
            assert!(policy.standings.len() <= 20, "those of pods that are gone are forgotten");
            let known: usize = publisher.by_namespace.values().map(HashSet::len).sum();
            assert_eq!(known, publisher.pods.len());
        }
    }

    #[test]
    fn a_decision_is_made_once_for_each_change_that_concerns_it() {
        let (index, policy) = policy(Source::Node);
        index.apply(namespace(1, 1, None));
        index.apply(namespace(2, 1, None));
        index.apply(pod(1, 1, Some("reader")));
        let known = || policy.reader.record(&Pod::test(1).uid).unwrap();
        let first = policy.standing(&known());
        let is_first = || Arc::ptr_eq(&policy.standing(&known()), &first);
        assert!(is_first());
        index.apply(namespace(2, 2, Some("(")));
        index.apply(pod(2, 1, Some("writer")));
        index.apply(namespace(1, 3, None));
        index.apply(pod(1, 2, Some("reader")));
        assert!(is_first(), "nothing that it depends on has changed");
        index.apply(namespace(1, 4, Some("(")));
        assert!(matches!(policy.standing(&known()).decision(), Decision::Refuse(_)));
        assert!(!is_first());
        index.apply(namespace(1, 5, None));
        assert!(!is_first(), "the same text again is another record");
        assert_eq!(policy.standing(&known()).decision(), first.decision());
    }

    #[test]
    fn a_request_that_outlives_its_pod_leaves_nothing_behind() {
        let (index, policy) = policy(Source::Node);
        index.apply(namespace(1, 1, None));
        index.apply(pod(1, 1, Some("reader")));
        let mut publisher = Publisher::new(policy.clone(), |_: &Pod| true);
        let wanted = watch::Sender::new(WantedRoles::default());
        publisher.follow(&wanted);
        let found = policy.reader.record(&Pod::test(1).uid).unwrap();
        index.delete(&*found);
        publisher.follow(&wanted);
        let _ = policy.standing(&found);
        assert_eq!(policy.standings.len(), 0);
    }

    /// Ten times the pods would take ten times as long if all of them were decided about.
    #[test]
    fn a_change_costs_what_it_concerns_and_not_what_is_known() {
        let (index, policy) = policy(Source::Node);
        index.reset((0..3).map(|n| namespace(n, 1, None)).collect(), Some(1));
        index.reset((0..3_000).map(|n| pod(n, 1, Some("reader"))).collect(), Some(1));
        let mut publisher = Publisher::new(policy.clone(), |_: &Pod| true);
        let wanted = watch::Sender::new(WantedRoles::default());
        publisher.follow(&wanted);
        let before = policy.standings.all();
        index.apply(pod(7, 2, Some("writer")));
        publisher.follow(&wanted);
        let after = policy.standings.all();
        let made = after.iter().filter(|(uid, it)| !Arc::ptr_eq(it, &before[*uid])).count();
        assert_eq!((after.len(), made), (3_000, 1));
        assert_eq!(publisher.concerned(vec![Changed::Pod(Pod::test(7).uid)]).len(), 1);
    }
}

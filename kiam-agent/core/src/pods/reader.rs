//! The read side of the pod table: which pod is calling?

use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{self, Instant},
};

use super::{
    Annotation, Changed, Client, Namespace, Origin, Pod, PodUid, Position, Record, ServiceAccount,
    index::Shared, tables::Tables,
};
use crate::role::AccountName;

/// The age after which the watch is stale and addresses are not trusted. Where no event comes, the agent lists after a
/// minute. So a longer silence means a server that can't be reached, or that can't reach etcd, and an address may be
/// another pod's by now.
pub(super) const STALE_AFTER: Duration = Duration::from_secs(90);

/// A reader of the pod table. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PodReader(Arc<Shared>);

/// Why the caller is not known to be a certain live pod.
///
/// Waiting may help ([`PodReader::wait`]). After the wait `Unknown` means "no such pod", and the others are rejections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// No live pod is known by this UID or address.
    #[error("pod not found")]
    Unknown,
    /// The UID is a pod's, but the connection comes from an address that the pod does not have.
    #[error("the source address is not the pod's")]
    AddressMismatch,
    /// Several live pods claim the address or the static pod's UID.
    #[error("several live pods claim the source address or the static pod's UID")]
    Ambiguous,
    /// Only the address is known, and the watch is stale.
    #[error("the watch of pods is stale, so that the pod of the source address is not certain")]
    Stale,
}

// === impl PodReader ===

impl PodReader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The live pod of `client`.
    ///
    /// # Errors
    ///
    /// [`NotFound`] where the pod is not certain.
    pub fn find(&self, client: &Client) -> Result<Arc<Pod>, NotFound> {
        match client {
            Client::Pod { uid, address, origin, .. } => {
                let pod = attested(&self.0.read(), uid)?;
                if self.fits(&pod, *address, *origin) {
                    Ok(pod)
                } else {
                    Err(NotFound::AddressMismatch)
                }
            }
            // It came from inside the pod's own network namespace.
            Client::PodListener { uid, .. } => attested(&self.0.read(), uid),
            Client::Address(address) => {
                let pods = self.0.read().pods_at(*address);
                let pod = only(pods)?;
                if self.pods_silence().is_none_or(|silence| silence >= STALE_AFTER) {
                    return Err(NotFound::Stale);
                }
                Ok(pod)
            }
        }
    }

    /// As [`PodReader::find`], but a failure requests a list of the node's pods if one may help, and is retried at each
    /// change for up to `hold`. Returns at once when it succeeds.
    ///
    /// # Errors
    ///
    /// The last [`NotFound`], when `hold` is over.
    pub async fn wait(&self, client: &Client, hold: Duration) -> Result<Arc<Pod>, NotFound> {
        if let Ok(pod) = self.find(client) {
            return Ok(pod);
        }
        let mut changes = self.changes();
        let mut last = match self.find(client) {
            Ok(pod) => return Ok(pod),
            Err(not_found) => not_found,
        };
        // A pod that translates its own traffic never matches, and the watch shows new addresses.
        if last != NotFound::AddressMismatch {
            self.0.missed.notify_one();
        }
        let deadline = Instant::now() + hold;
        while let Ok(Ok(())) = time::timeout_at(deadline, changes.changed()).await {
            match self.find(client) {
                Ok(pod) => return Ok(pod),
                Err(not_found) => last = not_found,
            }
        }
        Err(last)
    }

    /// The live pod of this UID, or the static pod whose config hash it is.
    ///
    /// # Errors
    ///
    /// [`NotFound::Unknown`] or [`NotFound::Ambiguous`].
    pub fn by_uid(&self, uid: &PodUid) -> Result<Arc<Pod>, NotFound> {
        attested(&self.0.read(), uid)
    }

    /// The last few roles that the pod named before its current one, as written.
    #[must_use]
    pub fn former_roles(&self, uid: &PodUid) -> Vec<Annotation> {
        self.0.read().former_roles(uid)
    }

    /// The namespace of this name.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        self.0.read().namespaces.get(name).cloned()
    }

    /// The ServiceAccount of this name.
    #[must_use]
    pub fn service_account(&self, name: &AccountName) -> Option<Arc<ServiceAccount>> {
        self.0.read().accounts.get(name).cloned()
    }

    /// The live pods, other than hostNetwork ones, whose records show this address. Several while an address changes
    /// hands.
    #[must_use]
    pub fn pods_at(&self, address: IpAddr) -> Vec<Arc<Pod>> {
        self.0.read().pods_at(address)
    }

    /// All known pods, those that have ended included, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.0.read().pods.values().cloned().collect()
    }

    /// The number of known objects of this kind.
    #[must_use]
    pub fn count<R: Record>(&self) -> usize {
        R::table(&self.0.read()).values().len()
    }

    /// The record of this UID, also of a pod that has ended.
    #[must_use]
    pub fn record(&self, uid: &PodUid) -> Option<Arc<Pod>> {
        self.0.read().pods.get(uid).cloned()
    }

    /// The objects that have changed since `position`, which moves on; `None` if all may have changed.
    #[must_use]
    pub fn changed_since(&self, position: &mut Position) -> Option<Vec<Changed>> {
        self.0.read().log.since(position)
    }

    /// The number that goes up with every change, now. What is looked up after it was read is as new as this revision.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.0.last_revision.load(Ordering::Acquire)
    }

    /// A number that goes up with every change. Subscribe, then look, then wait.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.revision.subscribe()
    }

    /// Returns when a request has waited for an unknown pod since the last return. For the one task that lists pods then.
    pub async fn missed(&self) {
        self.0.missed.notified().await;
    }

    /// Whether a connection of `pod` may come from `address` in a network namespace of this `origin`.
    fn fits(&self, pod: &Pod, address: IpAddr, origin: Origin) -> bool {
        let address = address.to_canonical();
        let has_it = || pod.addresses.iter().any(|own| own.to_canonical() == address);
        match origin {
            Origin::Node => pod.host_network && self.0.node.contains(address),
            // The kubelet publishes a pod's addresses only seconds after its sandbox runs.
            Origin::Pod => !pod.host_network && (pod.addresses.is_empty() || has_it()),
            Origin::Unknown => !pod.host_network && has_it(),
        }
    }

    /// The time since the stalest watch was last heard from, of all kinds: a stale watch of namespaces misses a revoked
    /// role as well as one of pods. `None` before the pods' watch was first heard from.
    #[must_use]
    pub fn silence(&self) -> Option<Duration> {
        let heard = self.0.heard();
        let first =
            heard.namespaces.into_iter().chain(heard.accounts).fold(heard.pods?, Instant::min);
        Some(first.elapsed())
    }

    /// The time since the watch of each kind was last heard from; `None` before the first time, and of kinds that are not
    /// watched.
    #[must_use]
    pub fn silences(&self) -> [(&'static str, Option<Duration>); 3] {
        let heard = self.0.heard();
        let kinds = [
            ("pods", heard.pods),
            ("namespaces", heard.namespaces),
            ("service accounts", heard.accounts),
        ];
        kinds.map(|(kind, at)| (kind, at.map(|at| at.elapsed())))
    }

    /// The time since the watch of pods was last heard from, by which the pod of an address is known.
    #[must_use]
    pub fn pods_silence(&self) -> Option<Duration> {
        self.0.heard().pods.map(|at| at.elapsed())
    }
}

/// The pod of an attested UID.
fn attested(tables: &Tables, uid: &PodUid) -> Result<Arc<Pod>, NotFound> {
    match tables.pods.get(uid).filter(|pod| pod.live) {
        Some(pod) => Ok(Arc::clone(pod)),
        None => only(tables.mirrors_of(uid)),
    }
}

fn only(mut pods: Vec<Arc<Pod>>) -> Result<Arc<Pod>, NotFound> {
    match (pods.pop(), pods.is_empty()) {
        (Some(pod), true) => Ok(pod),
        (Some(_), false) => Err(NotFound::Ambiguous),
        (None, _) => Err(NotFound::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{
        Config, NodeAddresses, PodIndex, TooLong,
        fixtures::{attested, config_hash, ip, namespace, uid},
    };

    /// Has 192.0.2.0/24.
    #[derive(Debug)]
    struct Node;

    impl NodeAddresses for Node {
        fn contains(&self, address: IpAddr) -> bool {
            matches!(address, IpAddr::V4(v4) if v4.octets().starts_with(&[192, 0, 2]))
        }
    }

    fn index(pods: impl IntoIterator<Item = Pod>) -> (PodIndex, PodReader) {
        let static_pod_namespaces = vec!["kube-system".to_owned(), "node-system".to_owned()];
        let config = Config { static_pod_namespaces, node: Arc::new(Node) };
        let (index, reader) = PodIndex::with(config);
        pods.into_iter().for_each(|pod| index.apply(pod));
        index.heard::<Pod>();
        (index, reader)
    }

    fn from(uid: PodUid, address: &str, origin: Origin) -> Client {
        Client::Pod { uid, address: ip(address), origin, opener: None }
    }

    fn on_node(uid: PodUid, address: &str) -> Client {
        from(uid, address, Origin::Node)
    }

    fn unplaced(uid: PodUid, address: &str) -> Client {
        from(uid, address, Origin::Unknown)
    }

    fn found(reader: &PodReader, client: &Client) -> Option<PodUid> {
        reader.find(client).ok().map(|pod| pod.uid.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn attested_pods_are_found_by_uid_and_checked_by_address() {
        let hash = config_hash;
        let (_index, reader) = index([
            Pod::test(1).at(&["10.0.0.1", "fd00::1"]),
            Pod::test(2),
            Pod::test(3).at(&["192.0.2.1"]).on_host_network(),
            Pod::test(4).at(&["10.0.0.4"]).over(),
            Pod::test(5).at(&["::ffff:10.0.0.5"]),
            Pod::test(6).mirroring("kube-system", hash(6)).on_host_network(),
            Pod::test(7).mirroring("default", hash(7)),
            Pod::test(8).mirroring("kube-system", hash(8)),
            Pod::test(9).mirroring("kube-system", hash(8)),
            Pod::test(10).mirroring("kube-system", hash(10)).over(),
            Pod::test(11).mirroring("node-system", hash(11)),
        ]);
        let (mismatch, unknown) = (Err(NotFound::AddressMismatch), Err(NotFound::Unknown));
        let collision = Err(NotFound::Ambiguous);
        for (client, expected, why) in [
            (attested(uid(1), "10.0.0.1"), Ok(uid(1)), "its address"),
            (attested(uid(1), "fd00::1"), Ok(uid(1)), "its other address"),
            (attested(uid(1), "::ffff:10.0.0.1"), Ok(uid(1)), "its address, v4-mapped"),
            (attested(uid(1), "10.0.0.9"), mismatch.clone(), "not its address"),
            (attested(uid(1), "::ffff:10.0.0.9"), mismatch.clone(), "not its address, v4-mapped"),
            (attested(uid(2), "10.0.0.9"), Ok(uid(2)), "no addresses published yet"),
            (on_node(uid(3), "192.0.2.1"), Ok(uid(3)), "the node's address"),
            (on_node(uid(3), "::ffff:192.0.2.2"), Ok(uid(3)), "another of the node's"),
            (on_node(uid(3), "10.0.0.1"), mismatch.clone(), "an address that the node has not"),
            (on_node(uid(3), "fd00::1"), mismatch.clone(), "nor this"),
            (attested(uid(3), "192.0.2.1"), mismatch.clone(), "not from the node's namespace"),
            (on_node(uid(1), "10.0.0.1"), mismatch.clone(), "its address, in the node's namespace"),
            (on_node(uid(2), "192.0.2.1"), mismatch.clone(), "no addresses, and not hostNetwork"),
            (unplaced(uid(1), "10.0.0.1"), Ok(uid(1)), "its address, before kernel 5.14"),
            (unplaced(uid(1), "10.0.0.9"), mismatch.clone(), "not its address, before 5.14"),
            (unplaced(uid(2), "10.0.0.9"), mismatch.clone(), "no addresses yet, before 5.14"),
            (unplaced(uid(3), "192.0.2.1"), mismatch.clone(), "another namespace, before 5.14"),
            (attested(uid(4), "10.0.0.4"), unknown.clone(), "over"),
            (attested(uid(5), "10.0.0.5"), Ok(uid(5)), "record v4-mapped"),
            (on_node(hash(6), "192.0.2.1"), Ok(uid(6)), "static pod by its mirror"),
            (on_node(hash(6), "10.0.0.6"), mismatch.clone(), "it is in the node's network, too"),
            (attested(hash(11), "10.0.0.11"), Ok(uid(11)), "of the other namespace of static pods"),
            (attested(hash(7), "10.0.0.7"), unknown.clone(), "hash forged in another namespace"),
            (attested(hash(8), "10.0.0.8"), collision, "two claim the hash"),
            (attested(hash(10), "10.0.0.8"), unknown.clone(), "mirror pod over"),
            (attested(uid(99), "10.0.0.1"), unknown.clone(), "another's address is no help"),
        ] {
            assert_eq!(reader.find(&client).map(|pod| pod.uid.clone()), expected, "{why}");
        }
    }

    #[test]
    fn the_last_few_roles_of_a_live_pod_are_remembered() {
        let (index, reader) = index([]);
        let named = |version, role: Option<&str>| Pod {
            role: role.map(Annotation::from),
            ..Pod::test(1).version(version)
        };
        let former = |n| -> Vec<String> {
            let texts = reader.former_roles(&uid(n));
            texts.iter().map(|role| role.text().unwrap().to_owned()).collect()
        };
        for (version, role) in (10..).zip([Some("a"), Some("a"), Some("b"), None, Some("a")]) {
            index.apply(named(version, role));
        }
        let long = Annotation::TooLong(TooLong { length: 100_000, most: 2048 });
        index.apply(Pod { role: Some(long), ..named(15, None) });
        index.apply(named(16, Some("c")));
        assert_eq!(former(1), ["a", "b"]);
        for version in 20..10_000 {
            index.apply(named(version, Some(&version.to_string())));
        }
        assert_eq!(former(1), ["9998", "9997", "9996", "9995"]);
        assert!(reader.former_roles(&uid(2)).is_empty());
        index.apply(named(10_001, Some("a")).over());
        assert!(reader.former_roles(&uid(1)).is_empty());
        for version in [20_000, 20_001] {
            let role = Some(Annotation::from(version.to_string().as_str()));
            index.apply(Pod { role, ..Pod::test(3).version(version) });
        }
        assert_eq!(former(3), ["20000"]);
        index.delete(&Pod::test(3));
        assert!(reader.former_roles(&uid(3)).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_real_uid_wins_over_a_hash_that_looks_like_it() {
        let mut pod = Pod::test(1);
        pod.uid = config_hash(7);
        let (_index, reader) = index([pod, Pod::test(2).mirroring("kube-system", config_hash(7))]);
        assert_eq!(found(&reader, &attested(config_hash(7), "10.0.0.1")), Some(config_hash(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_its_only_live_pods_and_nobodys_while_two_claim_it() {
        let client = |text| Client::Address(ip(text));
        let (index, reader) = index([
            Pod::test(1).at(&["10.0.0.1"]),
            Pod::test(2).at(&["10.0.0.2"]).over(),
            Pod::test(3).at(&["192.0.2.1"]).on_host_network(),
        ]);
        assert_eq!(found(&reader, &client("10.0.0.1")), Some(uid(1)));
        assert_eq!(found(&reader, &client("::ffff:10.0.0.1")), Some(uid(1)));
        assert_eq!(reader.find(&client("10.0.0.2")), Err(NotFound::Unknown), "the pod is over");
        assert!(matches!(reader.find(&client("192.0.2.1")), Err(NotFound::Unknown)));

        index.apply(Pod::test(4).at(&["10.0.0.1"]));
        assert_eq!(reader.find(&client("10.0.0.1")), Err(NotFound::Ambiguous));
        index.apply(Pod::test(1).at(&["10.0.0.1"]).over().version(5));
        assert_eq!(found(&reader, &client("10.0.0.1")), Some(uid(4)));
        index.delete(&Pod::test(4));
        assert_eq!(found(&reader, &client("10.0.0.1")), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reused_address_is_never_the_old_pods_once_the_new_record_is_known() {
        for seed in 0..300 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (index, reader) = index([]);
            // Each pod of a long row has one of two addresses; the news of its end may be late or lost.
            for n in 1..=30 {
                let address = if rng.bool() { "10.0.0.1" } else { "10.0.0.2" };
                let version = u64::from(n) * 10;
                index.apply(Pod::test(n).at(&[address]).version(version));
                let answer = found(&reader, &Client::Address(ip(address)));
                assert!(
                    answer.as_ref().is_none_or(|it| *it == uid(n)),
                    "seed {seed}: {answer:?} for {n}"
                );
                match rng.u8(0..4) {
                    0 => index.delete(&Pod::test(n)),
                    1 => index.apply(Pod::test(n).at(&[address]).over().version(version + 2)),
                    2 => {
                        let older = rng.u32(1..=n);
                        let list = Pod::test(older).at(&[address]).version(u64::from(older) * 10);
                        index.reset(vec![list], Some(version - 5));
                    }
                    _ => {}
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_not_believed_after_90_s_of_silence_but_an_attested_uid_is() {
        let (index, reader) = index([Pod::test(1).at(&["10.0.0.1"])]);
        let client = Client::Address(ip("10.0.0.1"));
        time::advance(Duration::from_millis(89_999)).await;
        assert!(reader.find(&client).is_ok());
        time::advance(Duration::from_millis(1)).await;
        assert_eq!(reader.find(&client), Err(NotFound::Stale));
        assert!(reader.find(&attested(uid(1), "10.0.0.1")).is_ok());

        // A list, or the watch's first word, ends the wait though no record changes.
        let waiting = tokio::spawn({
            let reader = reader.clone();
            async move { reader.wait(&client, Duration::from_secs(1)).await }
        });
        reader.missed().await;
        index.heard::<Pod>();
        assert!(waiting.await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_that_of_the_most_silent_kind_and_of_pods_alone_for_addresses() {
        let (index, reader) = index([Pod::test(1).at(&["10.0.0.1"])]);
        let seconds = || reader.silence().map(|silence| silence.as_secs());
        let hears = [
            PodIndex::heard::<Pod>,
            PodIndex::heard::<Namespace>,
            PodIndex::heard::<ServiceAccount>,
        ];
        for hear in hears {
            hear(&index);
        }
        for silent in 0..hears.len() {
            time::advance(Duration::from_secs(100)).await;
            for (kind, hear) in hears.iter().enumerate() {
                if kind != silent {
                    hear(&index);
                }
            }
            assert_eq!(seconds(), Some(100), "{silent}");
            let address = reader.find(&Client::Address(ip("10.0.0.1")));
            assert_eq!(address.is_ok(), silent != 0, "{silent}");
            hears[silent](&index);
            assert_eq!(seconds(), Some(0), "{silent}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_not_believed_before_the_first_sign_of_life() {
        let (index, reader) = PodIndex::new();
        index.apply(Pod::test(1).at(&["10.0.0.1"]));
        assert!(matches!(reader.find(&Client::Address(ip("10.0.0.1"))), Err(NotFound::Stale)));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_with_the_record_and_asks_for_a_list_once() {
        let (index, reader) = index([]);
        let started = Instant::now();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let reader = reader.clone();
                let client = attested(uid(1), "10.0.0.1");
                tokio::spawn(async move { reader.wait(&client, Duration::from_secs(4)).await })
            })
            .collect();
        time::sleep(Duration::from_secs(1)).await;
        reader.missed().await;
        assert!(time::timeout(Duration::ZERO, reader.missed()).await.is_err());
        index.apply(Pod::test(2));
        time::sleep(Duration::from_secs(1)).await;
        index.apply(Pod::test(1));
        for task in waiting {
            assert_eq!(task.await.unwrap().unwrap().uid, uid(1));
        }
        assert_eq!(started.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_in_vain_lasts_as_long_as_the_hold() {
        let (index, reader) = index([Pod::test(1).at(&["10.0.0.1"])]);
        let started = Instant::now();
        let hold = Duration::from_millis(400);
        let answer = reader.wait(&attested(uid(2), "10.0.0.1"), hold).await;
        assert!(matches!(answer, Err(NotFound::Unknown)));
        assert_eq!(started.elapsed(), hold);
        reader.missed().await;
        let answer = reader.wait(&attested(uid(1), "10.0.0.9"), hold).await;
        assert!(matches!(answer, Err(NotFound::AddressMismatch)));
        assert!(time::timeout(Duration::ZERO, reader.missed()).await.is_err(), "asks for no list");
        drop(index);
    }

    #[test]
    fn a_deleted_pod_stays_deleted_whatever_older_lists_and_events_say() {
        let (index, reader) = PodIndex::new();
        index.reset(vec![Pod::test(1).version(10)], Some(20));
        index.apply(Pod::test(2).version(30));
        index.delete(&Pod::test(1));
        index.apply(Pod::test(1).version(12));
        index.reset(vec![Pod::test(1).version(10)], Some(25));
        index.reset(vec![Pod::test(1).version(10)], Some(15));
        assert_eq!(reader.all().iter().map(|pod| pod.uid.clone()).collect::<Vec<_>>(), [uid(2)]);
    }

    #[test]
    fn the_revision_moves_with_changes_only() {
        let (index, reader) = PodIndex::new();
        let mut changes = reader.changes();
        let mut moved = move || changes.has_changed().unwrap().then(|| changes.mark_unchanged());
        index.apply(Pod::test(1));
        assert!(moved().is_some());
        index.apply(Pod::test(1));
        index.delete(&Pod::test(2));
        index.heard::<Pod>();
        index.reset(vec![Pod::test(1)], Some(4));
        assert!(moved().is_none());
        index.apply(Pod::test(1).version(5));
        index.reset(vec![Pod::test(1).version(6)], Some(6));
        assert!(moved().is_none(), "a new version of the same is no change");
        index.apply(namespace("default", 1));
        assert!(moved().is_some());
        index.reset(vec![namespace("default", 1)], Some(4));
        index.apply(namespace("default", 5));
        index.reset(vec![namespace("default", 6)], Some(6));
        assert!(moved().is_none());
        let account = |version, role: &str| ServiceAccount {
            name: AccountName::new("default", "reading"),
            resource_version: Some(version),
            role: Some(role.into()),
        };
        index.apply(account(1, "a"));
        assert!(moved().is_some());
        index.apply(account(2, "a"));
        index.reset(vec![account(3, "a")], Some(3));
        assert!(moved().is_none());
        index.apply(account(2, "b"));
        assert!(moved().is_none(), "older than what is known");
        index.apply(account(4, "b"));
        assert!(moved().is_some());
        index.reset::<Namespace>(vec![], Some(7));
        assert!(moved().is_some());
        assert!(reader.namespace("default").is_none());
        index.delete(&Pod::test(1));
        assert!(moved().is_some());
        assert_eq!(reader.count::<Pod>(), 0);
    }
}

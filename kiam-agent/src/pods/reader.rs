//! Looking pods up.

use std::{
    net::IpAddr,
    sync::{Arc, PoisonError, RwLockReadGuard},
    time::Duration,
};

use tokio::{sync::watch, time::timeout};

use super::{
    Client, Namespace, Pod,
    index::{Records, STALE_AFTER, Shared},
};

/// The reading side of a [`super::PodIndex`]; cheap to clone.
#[derive(Clone, Debug)]
pub struct PodReader(pub(super) Arc<Shared>);

/// Why a client is no pod that may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// The API server has not told of it, or no longer knows it. Worth waiting for.
    #[error("pod not found")]
    Unknown,
    /// The pod is known, and the connection's source is none of its addresses.
    #[error("the source address is not the pod's")]
    AddressMismatch,
    /// Two live pods have the address, and only the address is known.
    #[error("several live pods have the source address")]
    Ambiguous,
    /// Only the address is known, and the records of who has it may be old.
    #[error("the watch of pods has been silent for too long to tell whose the source address is")]
    Stale,
}

// === impl PodReader ===

impl PodReader {
    /// The live pod that `client` is.
    ///
    /// A pod whose addresses are not known yet is accepted on its UID: the kubelet publishes them seconds
    /// after the pod may connect. A hostNetwork pod may come from any address of the node.
    ///
    /// # Errors
    ///
    /// [`NotFound`].
    pub fn find(&self, client: &Client) -> Result<Arc<Pod>, NotFound> {
        match client {
            Client::Pod { uid, address } => {
                let records = self.records();
                let pod = records.pod(uid).filter(|pod| pod.live).ok_or(NotFound::Unknown)?;
                let may = pod.host_network
                    || pod.addresses.is_empty()
                    || pod.addresses.contains(&address.to_canonical());
                if may { Ok(pod.clone()) } else { Err(NotFound::AddressMismatch) }
            }
            Client::Address(address) => self.find_address(*address),
        }
    }

    fn find_address(&self, address: IpAddr) -> Result<Arc<Pod>, NotFound> {
        let mut pods = self.pods_at(address);
        match (pods.pop(), pods.is_empty()) {
            (None, _) => Err(NotFound::Unknown),
            (Some(_), false) => Err(NotFound::Ambiguous),
            (Some(_), true) if self.0.silence().is_none_or(|silence| silence >= STALE_AFTER) => {
                Err(NotFound::Stale)
            }
            (Some(pod), true) => Ok(pod),
        }
    }

    /// As [`PodReader::find`], but a pod that is not known yet is waited for, up to `hold`.
    ///
    /// # Errors
    ///
    /// [`NotFound`], once nothing is to be waited for.
    pub async fn wait(&self, client: &Client, hold: Duration) -> Result<Arc<Pod>, NotFound> {
        // Subscribed before the look, so that no change between the two is missed.
        let mut changes = self.changes();
        let found = self.find(client);
        if found != Err(NotFound::Unknown) {
            return found;
        }
        self.0.missed.notify_one();
        let known = async {
            while changes.changed().await.is_ok() {
                let found = self.find(client);
                if found != Err(NotFound::Unknown) {
                    return found;
                }
            }
            Err(NotFound::Unknown)
        };
        timeout(hold, known).await.unwrap_or(Err(NotFound::Unknown))
    }

    /// The live pods, not of the host's network, that have `address`.
    #[must_use]
    pub fn pods_at(&self, address: IpAddr) -> Vec<Arc<Pod>> {
        self.records().at(address.to_canonical())
    }

    /// Every pod that is known.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.records().pods().cloned().collect()
    }

    /// A namespace by its name.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<Arc<Namespace>> {
        self.records().namespace(name)
    }

    /// Changes whenever a record does.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.revision.subscribe()
    }

    /// Returns when a pod was asked for that is not known: a list may tell of it.
    pub async fn missed(&self) {
        self.0.missed.notified().await;
    }

    /// How long the watch has shown no sign of life; `None` before its first.
    #[must_use]
    pub fn silence(&self) -> Option<Duration> {
        self.0.silence()
    }

    fn records(&self) -> RwLockReadGuard<'_, Records> {
        self.0.records.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::{PodIndex, PodUid};

    const IP: &str = "10.77.1.2";

    fn pod(uid: &str, version: u64) -> Pod {
        Pod {
            uid: PodUid::new(uid),
            namespace: "default".to_owned(),
            name: uid.to_owned(),
            resource_version: Some(version),
            node: Some("node-1".to_owned()),
            host_ip: None,
            addresses: vec![IP.parse().unwrap()],
            host_network: false,
            live: true,
            config_hash: None,
            role: None,
            session_name: None,
            external_id: None,
        }
    }

    fn attested(uid: &str, address: &str) -> Client {
        Client::Pod { uid: PodUid::new(uid), address: address.parse().unwrap() }
    }

    fn uid(found: Result<Arc<Pod>, NotFound>) -> Result<String, NotFound> {
        found.map(|pod| pod.uid.to_string())
    }

    #[test]
    fn attested_pod_must_have_the_address_once_its_addresses_are_known() {
        let (index, reader) = PodIndex::new();
        index.apply(pod("a", 1));
        index.apply(Pod { addresses: vec![], ..pod("b", 1) });
        index.apply(Pod { host_network: true, ..pod("c", 1) });
        index.apply(Pod { live: false, ..pod("d", 1) });
        let cases = [
            ("a", IP, Ok("a")),
            ("a", "::ffff:10.77.1.2", Ok("a")),
            ("a", "10.77.1.3", Err(NotFound::AddressMismatch)),
            ("b", "10.77.1.3", Ok("b")),
            ("c", "10.77.0.1", Ok("c")),
            ("d", IP, Err(NotFound::Unknown)),
            ("e", IP, Err(NotFound::Unknown)),
        ];
        for (who, address, expected) in cases {
            let found = uid(reader.find(&attested(who, address)));
            assert_eq!(found, expected.map(str::to_owned), "{who} from {address}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn address_alone_is_refused_when_two_have_it_or_the_watch_is_silent() {
        let (index, reader) = PodIndex::new();
        let client = Client::Address(IP.parse().unwrap());
        index.apply(pod("a", 1));
        assert_eq!(uid(reader.find(&client)), Err(NotFound::Stale));
        index.heard();
        assert_eq!(uid(reader.find(&client)), Ok("a".to_owned()));
        tokio::time::advance(STALE_AFTER).await;
        assert_eq!(uid(reader.find(&client)), Err(NotFound::Stale));
        index.heard();
        index.apply(pod("b", 2));
        assert_eq!(uid(reader.find(&client)), Err(NotFound::Ambiguous));
        index.apply(Pod { live: false, ..pod("a", 3) });
        assert_eq!(uid(reader.find(&client)), Ok("b".to_owned()));
        index.delete(&PodUid::new("b"));
        assert_eq!(uid(reader.find(&client)), Err(NotFound::Unknown));
    }

    #[test]
    fn older_records_and_lists_change_nothing() {
        let (index, reader) = PodIndex::new();
        index.apply(Pod { name: "new".to_owned(), ..pod("a", 9) });
        index.apply(Pod { name: "old".to_owned(), ..pod("a", 8) });
        index.reset(vec![], Some(8));
        assert_eq!(reader.all()[0].name, "new");
        index.reset(vec![pod("b", 3)], Some(10));
        assert_eq!(reader.all().len(), 1);
        assert_eq!(reader.all()[0].name, "b");
    }

    #[test]
    fn static_pod_is_found_by_its_hash_only_in_kube_system_and_only_if_one_claims_it() {
        let hash = "5f6c3a1b2d4e5f60718293a4b5c6d7e8";
        let claims = |uid: &str, namespace: &str| Pod {
            namespace: namespace.to_owned(),
            config_hash: Some(hash.to_owned()),
            ..pod(uid, 1)
        };
        let (index, reader) = PodIndex::new();
        index.apply(claims("forged", "default"));
        assert_eq!(uid(reader.find(&attested(hash, IP))), Err(NotFound::Unknown));
        index.apply(claims("mirror", "kube-system"));
        assert_eq!(uid(reader.find(&attested(hash, IP))), Ok("mirror".to_owned()));
        index.apply(claims("other", "kube-system"));
        assert_eq!(uid(reader.find(&attested(hash, IP))), Err(NotFound::Unknown));
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_pod_is_waited_for_and_asked_about() {
        let (index, reader) = PodIndex::new();
        let hold = Duration::from_millis(400);
        assert_eq!(uid(reader.wait(&attested("a", IP), hold).await), Err(NotFound::Unknown));
        reader.missed().await;
        let waiting = tokio::spawn({
            let reader = reader.clone();
            async move { uid(reader.wait(&attested("a", IP), hold).await) }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        index.apply(pod("a", 1));
        assert_eq!(waiting.await.unwrap(), Ok("a".to_owned()));
    }
}

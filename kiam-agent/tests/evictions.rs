//! Evictions, as a small API server over real HTTP gets them.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use http::Method;
use kiam_agent::{
    cluster::{self, Cluster, EvictionParts, SyncLatches},
    proxy::Proxies,
};
use kiam_core::{
    lifecycle::{self, DrainSignal, Readiness},
    pods::{PodIndex, PodReader},
    role::Source,
};
use lab::fake::{
    Injected, Place,
    kubernetes::{Kubernetes, PodRecord, Store},
};
use prometheus_client::registry::Registry;
use serde_json::json;
use tempfile::TempDir;
use tokio::{task::JoinSet, time};

const PATIENCE: Duration = Duration::from_secs(60);
const PACE: Duration = Duration::from_millis(50);
const NODE: &str = "n1";

/// What evicts all pods but those that are called `young`, of a node that it watches.
struct Fixture {
    api: Kubernetes,
    registry: Registry,
    pods: PodReader,
    _stop: DrainSignal,
    _tasks: JoinSet<()>,
    _folder: TempDir,
}

impl Fixture {
    async fn start(pods: &[(&str, Option<&str>)]) -> Self {
        let api = Kubernetes::start(Place::loopback()).unwrap();
        for (number, (name, controller)) in pods.iter().enumerate() {
            api.apply_pod(&record(number, name, *controller));
        }
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig).unwrap();
        let config = cluster::Config {
            kubeconfig: Some(kubeconfig),
            node_name: Some(NODE.to_owned()),
            sync_interval: PATIENCE,
            stall: PATIENCE,
            startup_taint: None,
            evict_older_pods: true,
            prove_after: PATIENCE,
            proxies: Proxies::default(),
        };
        let mut registry = Registry::default();
        let metrics = cluster::Metrics::register(&mut registry);
        let readiness = Readiness::default();
        let cluster = Cluster::new(config, &readiness).unwrap();
        let evictions = cluster.evictions(&metrics).unwrap();
        let (index, reader) = PodIndex::new();
        let synced = SyncLatches::new(&readiness, Source::Node);
        let (stop, drain) = lifecycle::drain();
        let mut tasks = JoinSet::new();
        tasks.spawn(cluster.run(index, reader.clone(), synced, metrics, drain.clone()));
        let parts = EvictionParts {
            pods: reader.clone(),
            is_due: Box::new(|pod| pod.name != "young"),
            pace: PACE,
        };
        tasks.spawn(evictions.run(parts, drain));
        Self { api, registry, pods: reader, _stop: stop, _tasks: tasks, _folder: folder }
    }

    /// How often each pod was to be evicted.
    fn tried(&self) -> BTreeMap<String, usize> {
        let mut tried = BTreeMap::new();
        for seen in self.api.seen() {
            if let Some(pod) = seen.path.strip_suffix("/eviction") {
                *tried.entry(pod.rsplit('/').next().unwrap().to_owned()).or_default() += 1;
            }
        }
        tried
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.pods.all().iter().map(|pod| pod.name.clone()).collect();
        names.sort();
        names
    }

    async fn until(&self, holds: impl Fn() -> bool) {
        let waited = time::timeout(PATIENCE, async {
            while !holds() {
                time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(waited.await.is_ok(), "{:?} {:?}\n{}", self.tried(), self.names(), self.metrics());
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    fn counts(&self, outcome: &str, least: u64) -> bool {
        let name = format!("kiam_cluster_evictions_total{{outcome=\"{outcome}\"}} ");
        let metrics = self.metrics();
        let count = metrics.lines().find_map(|line| line.strip_prefix(&name));
        count.is_some_and(|count| count.parse::<u64>().unwrap() >= least)
    }
}

fn uid(number: usize) -> String {
    format!("{number:08x}-0000-4000-8000-000000000000")
}

fn record(number: usize, name: &str, controller: Option<&str>) -> PodRecord {
    let record = PodRecord::scheduled("shop", name, &uid(number), NODE);
    match controller {
        Some(kind) => record.controller(kind),
        None => record,
    }
}

fn refuse(code: u16, reason: &str, pod: &str) -> Injected {
    let path = format!("/api/v1/namespaces/shop/pods/{pod}/eviction");
    Injected::refuse(code, reason).method(Method::POST).path(&path)
}

#[tokio::test]
async fn only_pods_that_come_back_elsewhere_are_evicted() {
    let fixture = Fixture::start(&[
        ("web", Some("ReplicaSet")),
        ("db", Some("StatefulSet")),
        ("job", Some("Job")),
        ("daemon", Some("DaemonSet")),
        ("static", Some("Node")),
        ("bare", None),
        ("flow", Some("Workflow")),
        ("young", Some("ReplicaSet")),
    ])
    .await;
    let rest = ["bare", "daemon", "flow", "static", "young"];
    fixture.until(|| fixture.names() == rest).await;
    time::sleep(PACE * 10).await;
    let tried = fixture.tried();
    assert_eq!(tried.keys().collect::<Vec<_>>(), ["db", "job", "web"]);
    assert!(tried.values().all(|times| *times == 1) && fixture.counts("Evicted", 3), "{tried:?}");
}

#[tokio::test]
async fn a_budget_delays_its_own_pods_alone() {
    let fixture = Fixture::start(&[]).await;
    let budget = fixture.api.faults().inject(refuse(429, "TooManyRequests", "a"));
    fixture.api.apply_pod(&record(1, "a", Some("ReplicaSet")));
    fixture.until(|| budget.met() == 1).await;
    fixture.api.apply_pod(&record(2, "b", Some("ReplicaSet")));
    fixture.until(|| fixture.names() == ["a"]).await;
    fixture.until(|| fixture.counts("Budget", 3)).await;
    budget.lift();
    fixture.until(|| fixture.names().is_empty()).await;
}

#[tokio::test]
async fn a_pod_of_the_same_name_that_came_since_is_left_alone() {
    let fixture = Fixture::start(&[]).await;
    let store: Arc<Store> = fixture.api.store();
    let lost = fixture.api.faults().inject(refuse(404, "NotFound", "a"));
    fixture.api.apply_pod(&record(2, "a", Some("ReplicaSet")));
    fixture.until(|| lost.met() == 1 && fixture.counts("Gone", 1)).await;
    // The agent does not hear of the next one.
    store.stall_watches(true);
    store.apply_pod(&record(3, "a", Some("ReplicaSet")));
    lost.lift();
    fixture.until(|| fixture.counts("Gone", lost.met() + 1)).await;
    let evictions = store.seen().into_iter().filter(|seen| seen.path.ends_with("/eviction"));
    let asked: Vec<_> = evictions.map(|seen| seen.body["deleteOptions"].clone()).collect();
    let named = json!({ "preconditions": { "uid": uid(2) } });
    assert!(asked.len() >= 2 && asked.iter().all(|options| *options == named), "{asked:?}");
    store.stall_watches(false);
}

#[tokio::test]
async fn a_pod_that_takes_long_to_end_is_evicted_and_counted_once() {
    let fixture = Fixture::start(&[]).await;
    fixture.api.apply_pod(&record(1, "slow", Some("ReplicaSet")).finalizer("example.com/archive"));
    fixture.until(|| fixture.counts("Evicted", 1)).await;
    // The next one's turn comes after twelve paces.
    fixture.api.apply_pod(&record(2, "next", Some("ReplicaSet")));
    fixture.until(|| fixture.names() == ["slow"]).await;
    time::sleep(PACE * 20).await;
    assert_eq!(fixture.tried(), [("next".to_owned(), 1), ("slow".to_owned(), 1)].into());
    assert!(!fixture.counts("Evicted", 3), "{}", fixture.metrics());
}

#[tokio::test]
async fn only_a_pod_that_is_not_there_is_gone() {
    let fixture = Fixture::start(&[]).await;
    let passing = fixture.api.faults().inject(conflict(
        "a",
        "Operation cannot be fulfilled on pods \"a\": the object has been modified; please apply your changes to the latest version and try again",
    ));
    fixture.api.apply_pod(&record(1, "a", Some("ReplicaSet")));
    fixture.until(|| fixture.counts("Failed", 1)).await;
    passing.lift();
    fixture.until(|| fixture.counts("Evicted", 1)).await;
    assert!(!fixture.counts("Gone", 1), "{}", fixture.metrics());
    // As the registry says it; the fake server says it as etcd's client does.
    let other = fixture.api.faults().inject(conflict(
        "b",
        "the UID in the precondition (1) does not match the UID in record (2). The object might have been deleted and then recreated",
    ));
    fixture.api.apply_pod(&record(2, "b", Some("ReplicaSet")));
    fixture.until(|| fixture.counts("Gone", 1)).await;
    other.lift();
}

fn conflict(pod: &str, message: &str) -> Injected {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "reason": "Conflict", "code": 409, "message": message,
    });
    let path = format!("/api/v1/namespaces/shop/pods/{pod}/eviction");
    Injected::body(409, &status.to_string()).method(Method::POST).path(&path)
}

/// As the API server says it, for whatever reason.
fn forbid(pod: &str, why: &str) -> Injected {
    let message = format!("pods \"{pod}\" is forbidden: {why}");
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure",
        "reason": "Forbidden", "code": 403, "message": message,
    });
    let path = format!("/api/v1/namespaces/shop/pods/{pod}/eviction");
    Injected::body(403, &status.to_string()).method(Method::POST).path(&path)
}

#[tokio::test]
async fn without_the_right_it_is_not_tried_again_and_again() {
    let why = "User \"system:serviceaccount:kube-system:kiam-agent\" cannot create resource \"pods/eviction\" in \
               API group \"\" in the namespace \"shop\"";
    let fixture = Fixture::start(&[]).await;
    let forbidden = ["a", "b"].map(|pod| fixture.api.faults().inject(forbid(pod, why)));
    fixture.api.apply_pod(&record(1, "a", Some("ReplicaSet")));
    fixture.api.apply_pod(&record(2, "b", Some("ReplicaSet")));
    fixture.until(|| fixture.counts("Forbidden", 1)).await;
    time::sleep(PACE * 10).await;
    assert_eq!(forbidden.iter().map(|fault| fault.met()).sum::<u64>(), 1);
}

#[tokio::test]
async fn a_pod_that_may_not_be_evicted_keeps_no_other_from_it() {
    for why in [
        "unable to create new content in namespace shop because it is being terminated",
        "ValidatingAdmissionPolicy 'keep' with binding 'keep' denied request: keep",
    ] {
        let fixture = Fixture::start(&[]).await;
        let forbidden = fixture.api.faults().inject(forbid("a", why));
        fixture.api.apply_pod(&record(1, "a", Some("ReplicaSet")));
        fixture.until(|| forbidden.met() == 1).await;
        fixture.api.apply_pod(&record(2, "b", Some("ReplicaSet")));
        fixture.until(|| fixture.names() == ["a"]).await;
        forbidden.lift();
        fixture.until(|| fixture.names().is_empty()).await;
    }
}

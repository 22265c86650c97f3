//! The watch of pods and namespaces, against a small API server over real HTTP.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

mod failing;
mod history;
mod silence;

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use kiam_agent::{
    cluster::{Cluster, Config, Metrics, SyncLatches},
    proxy::Proxies,
};
use kiam_core::{
    lifecycle::{self, DrainSignal, Readiness},
    pods::{Client, NotFound, Origin, PodIndex, PodReader, PodUid},
    role::Source,
};
use lab::fake::{
    Injected, Place,
    kubernetes::{Gone, Kubernetes, NamespaceRecord, PodRecord, Resource},
};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time};

const HOUR: Duration = Duration::from_secs(3600);
/// Nothing here takes so long but a mistake; the longest are a few pauses of one or two seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// The part under test, running.
struct Fed {
    reader: PodReader,
    readiness: Readiness,
    registry: Registry,
    stop: DrainSignal,
    task: JoinHandle<()>,
    _folder: TempDir,
}

impl Fed {
    async fn by(server: &str, adjust: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config {
            kubeconfig: Some(kubeconfig(&folder, server)),
            node_name: Some("n1".to_owned()),
            sync_interval: HOUR,
            stall: HOUR,
            startup_taint: None,
            evict_older_pods: false,
            prove_after: HOUR,
            proxies: Proxies::default(),
        };
        adjust(&mut config);
        let readiness = Readiness::default();
        let synced = SyncLatches::new(&readiness, Source::Node);
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let (index, reader) = PodIndex::new();
        let (stop, drain) = lifecycle::drain();
        let cluster = Cluster::new(config, &readiness).unwrap();
        let task = tokio::spawn(cluster.run(index, reader.clone(), synced, metrics, drain));
        Self { reader, readiness, registry, stop, task, _folder: folder }
    }

    async fn with(api: &Kubernetes, adjust: impl FnOnce(&mut Config)) -> Self {
        let fed = Self::by(&api.address().to_string(), adjust).await;
        fed.until("synced", || fed.readiness.is_ready()).await;
        fed
    }

    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        eventually(what, holds).await;
    }

    async fn has(&self, names: &[&str]) {
        self.until(&format!("pods {names:?}"), || self.names() == names).await;
    }

    /// The pods that are known, by name.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.reader.all().iter().map(|pod| pod.name.clone()).collect();
        names.sort();
        names
    }

    fn role(&self, name: &str) -> Option<String> {
        let all = self.reader.all();
        let role = all.iter().find(|pod| pod.name == name)?.role.as_ref()?;
        role.text().ok().map(str::to_owned)
    }

    /// The line of a metric, by how it starts.
    fn metric(&self, start: &str) -> Option<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        Some(text.lines().find_map(|line| line.strip_prefix(start))?.trim().to_owned())
    }
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let waited = time::timeout(PATIENCE, async {
        while !holds() {
            time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "never came: {what}");
}

fn kubeconfig(folder: &TempDir, server: &str) -> PathBuf {
    let path = folder.path().join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{server}")}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    std::fs::write(&path, text.to_string()).unwrap();
    path
}

/// A server whose quiet watches stay quiet.
fn server() -> Kubernetes {
    let api = Kubernetes::start(Place::loopback()).unwrap();
    api.bookmark_every(HOUR);
    api
}

fn uid(n: u32) -> String {
    format!("{n:08x}-0000-4000-8000-000000000000")
}

fn pod(name: &str, n: u32) -> PodRecord {
    PodRecord::scheduled("team", name, &uid(n), "n1")
}

fn attested(n: u32) -> Client {
    let address = "10.0.0.1".parse().unwrap();
    Client::Pod { uid: PodUid::new(&uid(n)), address, origin: Origin::Pod, opener: None }
}

#[tokio::test]
async fn only_this_nodes_pods_and_only_the_metadata_of_namespaces_are_asked_for() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    api.apply_pod(&PodRecord::scheduled("team", "elsewhere", &uid(2), "n2"));
    api.apply_namespace(
        &NamespaceRecord::new("team").annotation("iam.amazonaws.com/permitted", "r.*"),
    );
    let fed = Fed::with(&api, |_| {}).await;
    fed.has(&["a"]).await;
    assert_eq!(fed.reader.namespace("team").unwrap().permitted, Some("r.*".into()));
    eventually("both watches", || api.open_watches() == 2).await;
    for seen in api.seen() {
        let query = |name: &str| seen.query.get(name).map(String::as_str);
        let pods = seen.is_about(Resource::Pods);
        assert_eq!(query("fieldSelector"), pods.then_some("spec.nodeName=n1"), "{seen:?}");
        assert_eq!(seen.accept.contains("PartialObjectMetadata"), !pods, "{seen:?}");
        if seen.is_watch() {
            assert_eq!(query("allowWatchBookmarks"), Some("true"), "{seen:?}");
        } else if query("limit").is_some() {
            // How new etcd is.
            assert_eq!((pods, query("resourceVersion"), query("limit")), (false, None, Some("1")));
        } else {
            let (version, age) = (query("resourceVersion"), query("resourceVersionMatch"));
            let from_cache = version == Some("0") || pods && age == Some("NotOlderThan");
            assert!(from_cache, "{seen:?}");
        }
    }
    assert_eq!(fed.metric("kiam_cluster_pods ").as_deref(), Some("1"));
    assert!(fed.metric("kiam_cluster_silence_seconds ").is_some());
    let taken = r#"kiam_cluster_lists_total{resource="Pods",outcome="Taken"}"#;
    assert_eq!(fed.metric(taken).as_deref(), Some("1"));
}

#[tokio::test]
async fn changes_arrive_and_a_pod_of_the_same_name_is_another() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    api.apply_pod(&pod("a", 1).role("reader"));
    fed.has(&["a"]).await;
    api.apply_pod(&pod("a", 1).role("writer"));
    fed.until("the new role", || fed.role("a").as_deref() == Some("writer")).await;
    api.delete_pod("team", "a");
    api.apply_pod(&pod("a", 2));
    fed.until("the other pod", || fed.reader.find(&attested(2)).is_ok()).await;
    assert!(fed.reader.find(&attested(1)).is_err());
    api.apply_namespace(&NamespaceRecord::new("team"));
    fed.until("the namespace", || fed.reader.namespace("team").is_some()).await;
    api.delete_namespace("team");
    fed.until("its end", || fed.reader.namespace("team").is_none()).await;
    assert_eq!(api.lists(Resource::Pods), 1);
}

#[tokio::test]
async fn a_server_that_is_down_is_waited_for_and_what_is_known_is_kept() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    api.stop();
    let fed = Fed::by(&api.address().to_string(), |_| {}).await;
    let failed = r#"kiam_cluster_lists_total{resource="Pods",outcome="Failed"}"#;
    fed.until("a failed list", || fed.metric(failed).is_some()).await;
    assert_eq!(fed.readiness.pending(), ["namespaces", "pods"]);
    api.restart().unwrap();
    fed.until("synced", || fed.readiness.is_ready()).await;
    fed.has(&["a"]).await;

    api.stop();
    let failed = r#"kiam_cluster_watch_restarts_total{resource="Pods",reason="Failed"}"#;
    fed.until("a failed watch", || fed.metric(failed).is_some()).await;
    assert!(fed.readiness.is_ready());
    assert_eq!(fed.names(), ["a"]);
    api.apply_pod(&pod("b", 2));
    api.restart().unwrap();
    fed.has(&["a", "b"]).await;
    assert_eq!(api.lists(Resource::Pods), 1, "the watch goes on where it was");
}

#[tokio::test]
async fn refusals_are_waited_out() {
    let api = server();
    let forbidden = api.faults().inject(Injected::refuse(403, "Forbidden"));
    let fed = Fed::by(&api.address().to_string(), |_| {}).await;
    let failed = r#"kiam_cluster_lists_total{resource="Pods",outcome="Failed"}"#;
    fed.until("a failed list", || fed.metric(failed).is_some()).await;
    let failing = r#"kiam_cluster_failing{resource="Pods",request="List"}"#;
    fed.until("a list that fails", || fed.metric(failing).as_deref() == Some("1")).await;
    forbidden.lift();
    fed.until("synced", || fed.readiness.is_ready()).await;
    fed.until("lists that are answered", || fed.metric(failing).as_deref() == Some("0")).await;
}

#[tokio::test]
async fn watches_that_are_denied_are_shown_though_lists_are_answered() {
    let api = server();
    let denied = api.faults().inject(Injected::refuse(403, "Forbidden").field("watch", "true"));
    let fed = Fed::with(&api, |_| {}).await;
    let failing = r#"kiam_cluster_failing{resource="Pods",request="Watch"}"#;
    fed.until("a watch that fails", || fed.metric(failing).as_deref() == Some("1")).await;
    let listed = r#"kiam_cluster_failing{resource="Pods",request="List"}"#;
    assert_eq!(fed.metric(listed).as_deref(), Some("0"));
    denied.lift();
    fed.until("an open watch", || fed.metric(failing).as_deref() == Some("0")).await;
}

#[tokio::test]
async fn garbage_in_a_watch_is_passed_over() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let object = |change: fn(&mut Value)| {
        let mut object = json!({
            "metadata": {
                "name": "bad", "namespace": "team", "uid": uid(9), "resourceVersion": "1001",
                "annotations": {"iam.amazonaws.com/role": "reader"},
            },
            "spec": {"nodeName": "n1"},
        });
        change(&mut object);
        json!({"type": "ADDED", "object": object}).to_string()
    };
    for line in [
        "no JSON".to_owned(),
        "[]".to_owned(),
        "{\"type\":\"ADDED\",\"object\":{\"meta".to_owned(),
        "{\"odd\":1}".to_owned(),
        "{\"type\":\"ODD\",\"object\":{}}".to_owned(),
        "{\"type\":\"ADDED\"}".to_owned(),
        "{\"type\":\"ADDED\",\"object\":null}".to_owned(),
        "{\"type\":\"DELETED\",\"object\":{\"metadata\":{}}}".to_owned(),
        "{\"type\":\"BOOKMARK\",\"object\":{}}".to_owned(),
        object(|it| it["metadata"]["uid"] = json!(null)),
        object(|it| it["metadata"]["uid"] = json!("\u{1b}[2Jx")),
        object(|it| it["metadata"]["annotations"]["iam.amazonaws.com/role"] = json!(["x"])),
        object(|it| it["status"] = json!({"podIP": "10.0.0.300"})),
        object(|it| it["spec"]["nodeName"] = json!("n2")),
    ] {
        api.inject(&line);
    }
    api.apply_pod(&pod("a", 1));
    fed.until("the pod after it", || fed.reader.find(&attested(1)).is_ok()).await;
    assert_eq!(fed.names(), ["a"], "neither bad nor another node's");
    assert_eq!(api.watches(Resource::Pods), 1, "the watch went on");
    let unreadable = r#"kiam_cluster_events_total{resource="Pods",kind="Unreadable"}"#;
    assert!(fed.metric(unreadable).is_some());
}

#[tokio::test]
async fn a_missed_pod_is_listed_at_once_and_many_misses_are_one_list_a_second() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    api.stall_watches(true);
    api.apply_pod(&pod("a", 1));
    let found = fed.reader.wait(&attested(1), Duration::from_secs(5)).await;
    assert_eq!(found.unwrap().name, "a", "though the watch says nothing");

    let before = api.lists(Resource::Pods);
    for n in 100..150 {
        let hold = Duration::from_millis(30);
        assert!(fed.reader.wait(&attested(n), hold).await.is_err());
    }
    let lists = api.lists(Resource::Pods) - before;
    assert!((1..=4).contains(&lists), "{lists} lists in a second and a half");
    assert_eq!(api.lists(Resource::Namespaces), 1);
}

#[tokio::test]
async fn whatever_comes_instead_of_a_list_is_asked_for_again() {
    let faults = [
        Injected::refuse(500, "InternalError"),
        Injected::refuse(429, "TooManyRequests"),
        Injected::cut(),
        Injected::body(200, "<html>a proxy's</html>"),
        Injected::body(200, "{}"),
        Injected::slow(Duration::from_millis(300)),
    ];
    let tried = faults.map(|fault| async move {
        let shown = format!("{fault:?}");
        let api = server();
        api.apply_pod(&pod("a", 1));
        let fault = api.faults().inject(fault.path("/api/v1/pods").times(1));
        let fed = Fed::with(&api, |_| {}).await;
        fed.has(&["a"]).await;
        assert_eq!(fault.met(), 1, "{shown}");
    });
    futures::future::join_all(tried).await;
}

#[tokio::test]
async fn a_list_that_is_never_answered_is_given_up() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let hanging = api.faults().inject(Injected::hang().path("/api/v1/pods").times(1));
    let fed = Fed::by(&api.address().to_string(), |_| {}).await;
    eventually("the request", || hanging.met() == 1).await;
    assert_eq!(fed.names(), [""; 0]);
    time::pause();
    time::advance(Duration::from_secs(30)).await;
    time::resume();
    fed.has(&["a"]).await;
}

#[tokio::test]
async fn a_watch_that_never_opens_is_opened_anew() {
    let api = server();
    let hanging = api.faults().inject(Injected::hang().field("watch", "true"));
    let fed = Fed::with(&api, |config| config.stall = Duration::from_millis(300)).await;
    eventually("several attempts", || hanging.met() >= 4).await;
    api.apply_pod(&pod("a", 1));
    hanging.lift();
    fed.has(&["a"]).await;
}

#[tokio::test]
async fn a_drain_ends_it() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    eventually("both watches", || api.open_watches() == 2).await;
    fed.stop.start();
    time::timeout(PATIENCE, fed.task).await.unwrap().unwrap();
    eventually("closed watches", || api.open_watches() == 0).await;
}

#[tokio::test]
async fn a_kubeconfig_that_is_none_is_an_error_at_once_and_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing");
    let config = Config {
        kubeconfig: Some(path.clone()),
        node_name: None,
        sync_interval: HOUR,
        stall: HOUR,
        startup_taint: None,
        evict_older_pods: false,
        prove_after: HOUR,
        proxies: Proxies::default(),
    };
    let error = Cluster::new(config, &Readiness::default()).err().unwrap().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
}

fn object(name: &str, n: u32, version: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "team", "uid": uid(n), "resourceVersion": version},
        "spec": {"nodeName": "n1"},
    })
}

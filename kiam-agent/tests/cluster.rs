//! The watch of pods and namespaces, against a small API server over real HTTP.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use kiam_agent::{
    cluster::{Cluster, Config, Metrics, Synced},
    lifecycle::{self, DrainSignal, Readiness},
    pods::{Client, NotFound, PodIndex, PodReader, PodUid},
};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
    time,
};
use xtask::lab::fake::{
    Injected, Place,
    kubernetes::{Gone, Kubernetes, NamespaceRecord, PodRecord, Resource},
};

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
            prove_after: HOUR,
        };
        adjust(&mut config);
        let readiness = Readiness::default();
        let synced = Synced {
            pods: readiness.latch("pods"),
            namespaces: readiness.latch("namespaces"),
            service_accounts: None,
        };
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let (index, reader) = PodIndex::new();
        let (stop, drain) = lifecycle::drain();
        let cluster = Cluster::new(config).await.unwrap();
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
        self.reader.all().iter().find(|pod| pod.name == name)?.role.clone()
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
    Client::Pod { uid: PodUid::new(&uid(n)), address: "10.0.0.1".parse().unwrap() }
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
    assert_eq!(fed.reader.namespace("team").unwrap().permitted.as_deref(), Some("r.*"));
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
    api.apply_pod(&pod("a", 1).annotation("iam.amazonaws.com/role", "reader"));
    fed.has(&["a"]).await;
    api.apply_pod(&pod("a", 1).annotation("iam.amazonaws.com/role", "writer"));
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
async fn a_bookmark_is_a_sign_of_life_and_says_where_to_go_on() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let silence = || fed.reader.silence().unwrap();
    fed.until("silence", || silence() > Duration::from_millis(300)).await;
    api.skip_version();
    api.bookmark_every(Duration::from_millis(50));
    fed.until("a bookmark", || silence() < Duration::from_millis(200)).await;
    // What was before the bookmark may be forgotten now: the next watch starts behind it.
    api.compact();
    api.close_watches();
    eventually("other watches", || api.watches(Resource::Pods) == 2).await;
    api.apply_pod(&pod("a", 1));
    fed.has(&["a"]).await;
    assert_eq!(api.lists(Resource::Pods), 1);
}

#[tokio::test]
async fn a_history_that_is_gone_is_listed_anew_however_the_server_says_so() {
    for gone in [Gone::Status, Gone::Event] {
        let api = server();
        api.say_gone_as(gone);
        api.apply_pod(&pod("a", 1));
        api.apply_pod(&pod("b", 2));
        let fed = Fed::with(&api, |_| {}).await;
        fed.has(&["a", "b"]).await;
        api.stop();
        api.delete_pod("team", "a");
        api.compact();
        api.restart().unwrap();
        fed.has(&["b"]).await;
        let expired = r#"kiam_cluster_watch_restarts_total{resource="Pods",reason="Expired"}"#;
        fed.until("the count", || fed.metric(expired).is_some()).await;
    }
}

#[tokio::test]
async fn after_a_silent_watch_there_is_a_list_and_another_watch() {
    let api = server();
    let fed = Fed::with(&api, |config| config.stall = Duration::from_secs(1)).await;
    api.stall_watches(true);
    api.apply_pod(&pod("a", 1));
    fed.has(&["a"]).await;
    eventually("another watch", || api.watches(Resource::Pods) > 1).await;
    assert!(api.lists(Resource::Pods) > 1, "the watches say nothing");
    fed.until("a sign of life", || fed.reader.silence().unwrap() < Duration::from_secs(1)).await;

    api.stall_watches(false);
    api.bookmark_every(Duration::from_millis(50));
    api.close_watches();
    let bookmarks = || {
        let count = fed.metric(r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#);
        count.map_or(0, |count| count.parse::<u32>().unwrap())
    };
    fed.until("a bookmark", || bookmarks() > 0).await;
    let (lists, first) = (api.lists(Resource::Pods), bookmarks());
    fed.until("two seconds of bookmarks", || bookmarks() >= first + 40).await;
    assert_eq!(api.lists(Resource::Pods), lists, "bookmarks are no silence");
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
    forbidden.lift();
    fed.until("synced", || fed.readiness.is_ready()).await;
}

#[tokio::test]
async fn refused_namespaces_are_a_silence_though_the_pods_go_on() {
    let api = server();
    api.bookmark_every(Duration::from_millis(20));
    let fed = Fed::with(&api, |config| config.prove_after = Duration::from_millis(300)).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let refused =
        api.faults().inject(Injected::refuse(403, "Forbidden").path("/api/v1/namespaces"));
    api.close_watches();
    let quiet = Duration::from_secs(2);
    fed.until("a silence", || fed.reader.silence().unwrap() > quiet).await;
    let metric = r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#;
    let bookmarks = || fed.metric(metric).map_or(0, |count| count.parse::<u32>().unwrap());
    let before = bookmarks();
    fed.until("bookmarks of pods", || bookmarks() >= before + 20).await;
    assert!(fed.reader.silence().unwrap() > quiet);
    refused.lift();
    fed.until("an end of it", || fed.reader.silence().unwrap() < quiet).await;
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
async fn lost_events_are_healed_by_the_next_list() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let fed = Fed::with(&api, |config| config.sync_interval = Duration::from_millis(300)).await;
    api.stall_watches(true);
    api.delete_pod("team", "a");
    api.apply_pod(&pod("b", 2));
    fed.has(&["b"]).await;
    let lists = api.lists(Resource::Pods);
    fed.until("two more lists", || api.lists(Resource::Pods) > lists + 1).await;
    assert_eq!(api.lists(Resource::Namespaces), 1, "every node would list all of them");
    assert!(fed.reader.silence().unwrap() < Duration::from_secs(5), "a list is a sign of life");
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
async fn repeated_and_reordered_events_change_nothing() {
    let api = server();
    let fed = Fed::with(&api, |_| {}).await;
    eventually("both watches", || api.open_watches() == 2).await;
    let say = |kind: &str, name: &str, n: u32, version: u32, role: &str| {
        let mut object = object(name, n, &version.to_string());
        object["metadata"]["annotations"] = json!({"iam.amazonaws.com/role": role});
        api.inject(&json!({"type": kind, "object": object}).to_string());
    };
    say("ADDED", "a", 1, 2000, "reader");
    say("MODIFIED", "a", 1, 2010, "writer");
    say("MODIFIED", "a", 1, 2010, "writer");
    say("ADDED", "a", 1, 2000, "reader");
    say("ADDED", "mark", 8, 2020, "none");
    fed.has(&["a", "mark"]).await;
    assert_eq!(fed.role("a").as_deref(), Some("writer"), "the newest record holds");

    // A pod of the same name, and late news of the one before.
    say("ADDED", "a", 2, 2040, "admin");
    say("DELETED", "a", 1, 2030, "writer");
    say("MODIFIED", "a", 1, 2025, "reader");
    say("DELETED", "a", 1, 2030, "writer");
    say("DELETED", "mark", 8, 2050, "none");
    fed.has(&["a"]).await;
    assert_eq!(fed.role("a").as_deref(), Some("admin"));
    assert!(fed.reader.find(&attested(1)).is_err(), "it does not come back");
    assert!(fed.reader.find(&attested(2)).is_ok());
}

/// What this mode, kiam's, can't tell: whose an address is while nothing is heard. So it is not believed for long.
#[tokio::test]
async fn an_address_is_not_believed_once_the_watch_has_been_black_holed_for_90_s() {
    let api = server();
    let address = "10.0.0.1".parse().unwrap();
    api.apply_pod(&pod("old", 1).running(&[address]));
    let fed = Fed::with(&api, |config| config.stall = Duration::from_secs(90)).await;
    let client = Client::Address(address);
    let found = || fed.reader.find(&client).map(|pod| pod.name.clone());
    assert_eq!(found().as_deref(), Ok("old"));
    // Connections stay open, and nothing comes through them any more, whatever is asked.
    eventually("both watches", || api.open_watches() == 2).await;
    api.stall_watches(true);
    let hanging = api.faults().inject(Injected::hang());
    api.delete_pod("team", "old");
    api.apply_pod(&pod("new", 2).running(&[address]));
    time::pause();
    time::advance(Duration::from_secs(90)).await;
    assert_eq!(found(), Err(NotFound::Stale));
    time::resume();
    eventually("another watch", || hanging.met() > 0).await;
    let waited = fed.reader.wait(&client, Duration::from_millis(200)).await;
    assert_eq!(waited.err(), Some(NotFound::Stale), "an open connection is no sign of life");
    api.stall_watches(false);
    hanging.lift();
    fed.until("whose it is now", || found().as_deref() == Ok("new")).await;
}

/// Such a server answers, keeps its watches open and sends bookmarks, and knows nothing of what happens.
#[tokio::test]
async fn a_server_that_is_cut_off_from_etcd_gives_no_sign_of_life() {
    let api = server();
    api.bookmark_every(Duration::from_millis(50));
    let address = "10.0.0.1".parse().unwrap();
    api.apply_pod(&pod("old", 1).running(&[address]));
    let fed = Fed::with(&api, |config| {
        config.prove_after = Duration::from_millis(300);
        config.sync_interval = Duration::from_millis(200);
    });
    let fed = fed.await;
    let client = Client::Address(address);
    let found = || fed.reader.find(&client).map(|pod| pod.name.clone());
    let silence = || fed.reader.silence().unwrap();
    eventually("both watches", || api.open_watches() == 2).await;
    assert_eq!(found().as_deref(), Ok("old"));
    api.cut_from_etcd(true);
    api.delete_pod("team", "old");
    api.apply_pod(&pod("new", 2).running(&[address]));
    fed.until("a silence", || silence() > Duration::from_secs(2)).await;
    let metric = r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#;
    let bookmarks = || fed.metric(metric).map_or(0, |count| count.parse::<u32>().unwrap());
    let before = bookmarks();
    fed.until("bookmarks", || bookmarks() >= before + 10).await;
    // Nor does a watch that is opened there anew, after a list.
    api.close_watches();
    eventually("other watches", || api.watches(Resource::Pods) > 1).await;
    time::pause();
    time::advance(Duration::from_secs(90)).await;
    time::resume();
    assert_eq!(found(), Err(NotFound::Stale));
    assert!(fed.reader.find(&attested(1)).is_ok(), "what is attested is known to be the pod");
    api.cut_from_etcd(false);
    fed.until("whose it is now", || found().as_deref() == Ok("new")).await;
}

#[tokio::test]
async fn where_the_watch_tells_nothing_new_a_list_proves_that_there_is_nothing_and_else_none_is_made()
 {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let fed = Fed::with(&api, |config| config.prove_after = Duration::from_millis(300)).await;
    let proofs = || {
        let seen = api.seen().into_iter().filter(|seen| seen.is_about(Resource::Pods));
        seen.filter(|seen| seen.query.contains_key("resourceVersionMatch")).count()
    };
    fed.until("three proofs", || proofs() > 3).await;
    assert!(fed.reader.silence().is_some());
    for seen in api.seen().iter().filter(|seen| seen.query.contains_key("limit")) {
        assert!(seen.is_about(Resource::Namespaces) && seen.query["limit"] == "1", "{seen:?}");
        assert!(!seen.query.contains_key("resourceVersion"), "of no cache: {seen:?}");
    }
    let (lists, version) = (api.lists(Resource::Pods), api.version());
    let mut own = api.seen().into_iter().filter(|seen| seen.is_about(Resource::Pods));
    let last = own.rfind(|seen| !seen.is_watch()).unwrap();
    assert_eq!(last.query["resourceVersion"], version.to_string());
    // Bookmarks that go on are proof enough.
    api.bookmark_every(Duration::from_millis(20));
    let begun = time::Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        api.skip_version();
        time::sleep(Duration::from_millis(20)).await;
    }
    assert!(api.lists(Resource::Pods) <= lists + 1, "one may have been under way");
}

/// As servers before 1.31 do where pods hardly ever change.
#[tokio::test]
async fn a_server_whose_cache_does_not_catch_up_is_asked_for_what_etcd_has() {
    let api = server();
    api.apply_pod(&pod("a", 1));
    let behind = Injected::refuse(504, "Timeout").field("resourceVersionMatch", "NotOlderThan");
    let behind = api.faults().inject(behind.path("/api/v1/pods").times(1));
    let fed = Fed::with(&api, |_| {}).await;
    fed.has(&["a"]).await;
    assert_eq!(behind.met(), 1);
    assert!(fed.reader.silence().is_some());
    assert_eq!(api.lists(Resource::Pods), 2);
    let lagging = r#"kiam_cluster_lists_total{resource="Pods",outcome="Lagging"}"#;
    assert_eq!(fed.metric(lagging).as_deref(), Some("1"));
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
        prove_after: HOUR,
    };
    let error = Cluster::new(config).await.err().unwrap().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
}

/// What a scripted server says to a request line.
enum Reply {
    List(Value),
    Status(u16),
    /// The watch opens with these lines and stays open.
    Watch(Vec<Value>),
}

/// A server that says what its script says. Each answer ends its connection. Returns the address and the heads
/// of the requests.
async fn scripted<S, F>(script: S) -> (String, Arc<Mutex<Vec<String>>>)
where
    S: Fn(String) -> F + Clone + Send + 'static,
    F: Future<Output = Reply> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let (script, log) = (script.clone(), Arc::clone(&log));
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let head = String::from_utf8(head).unwrap();
                log.lock().unwrap().push(head.clone());
                let line = |status: u16| {
                    format!(
                        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
                    )
                };
                let (status, text, open) = match script(head).await {
                    Reply::List(body) => (200, body.to_string(), false),
                    Reply::Status(code) => {
                        let body = json!({"kind": "Status", "status": "Failure", "code": code});
                        (code, body.to_string(), false)
                    }
                    Reply::Watch(lines) => {
                        (200, lines.iter().map(|line| format!("{line}\n")).collect(), true)
                    }
                };
                stream.write_all((line(status) + &text).as_bytes()).await?;
                if open {
                    stream.read_u8().await?;
                }
                std::io::Result::Ok(())
            });
        }
    });
    (address, heads)
}

fn listed(version: &str, items: Value) -> Reply {
    Reply::List(json!({"metadata": {"resourceVersion": version}, "items": items}))
}

fn object(name: &str, n: u32, version: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "team", "uid": uid(n), "resourceVersion": version},
        "spec": {"nodeName": "n1"},
    })
}

#[tokio::test]
async fn a_list_that_lags_behind_is_asked_for_again_from_etcd_and_rolls_nothing_back() {
    let (address, heads) = scripted(|head| async move {
        if head.contains("/namespaces") {
            return if head.contains("watch=") {
                Reply::Watch(vec![])
            } else {
                listed("1", json!(null))
            };
        }
        match (head.contains("watch="), head.contains("resourceVersion=")) {
            // The watch is ahead of the cache that lists are made from: b is there, a is not.
            (true, _) => Reply::Watch(vec![
                json!({"type": "ADDED", "object": object("b", 2, "120")}),
                json!({"type": "DELETED", "object": object("a", 1, "130")}),
            ]),
            (false, true) => listed("100", json!([object("a", 1, "90"), {"metadata": 5}])),
            (false, false) => listed("140", json!([object("b", 2, "120"), object("c", 3, "135")])),
        }
    })
    .await;
    let fed = Fed::by(&address, |_| {}).await;
    fed.has(&["b"]).await;
    assert!(fed.reader.wait(&attested(3), PATIENCE).await.is_ok());
    fed.has(&["b", "c"]).await;
    let lagging = r#"kiam_cluster_lists_total{resource="Pods",outcome="Lagging"}"#;
    assert_eq!(fed.metric(lagging).as_deref(), Some("1"));
    let agent = format!("user-agent: kiam-agent/{}\r\n", env!("CARGO_PKG_VERSION"));
    assert!(heads.lock().unwrap().iter().all(|head| head.to_lowercase().contains(&agent)));
}

#[tokio::test]
async fn a_history_that_went_back_is_taken_as_it_is() {
    let restored = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let switch = Arc::clone(&restored);
    let (address, heads) = scripted(move |head| {
        let restored = switch.load(std::sync::atomic::Ordering::SeqCst);
        async move {
            match (head.contains("watch="), restored) {
                (true, true) if head.contains("resourceVersion=40") => {
                    Reply::Watch(vec![json!({"type": "ADDED", "object": object("new", 3, "41")})])
                }
                // As from a future that the server has not seen.
                (true, true) => Reply::Status(504),
                (true, false) => Reply::Watch(vec![]),
                (false, true) => listed("40", json!([object("old", 1, "30")])),
                (false, false) => {
                    listed("900", json!([object("old", 1, "800"), object("lost", 2, "850")]))
                }
            }
        }
    })
    .await;
    let fed = Fed::by(&address, |config| config.sync_interval = Duration::from_millis(500)).await;
    fed.has(&["lost", "old"]).await;
    restored.store(true, std::sync::atomic::Ordering::SeqCst);
    fed.has(&["new", "old"]).await;
    let heads = heads.lock().unwrap();
    assert!(heads.iter().any(|head| head.contains("pods") && !head.contains("resourceVersion")));
}

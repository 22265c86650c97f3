//! The whole agent against a real kube-apiserver and etcd: with nothing but the rights that `deploy/` gives it.
//!
//! The programs are not part of any package that a test could just install; `cargo xtask test apiserver` makes
//! them, some minutes once, and runs these tests. Without them the tests are skipped.

#![expect(clippy::unwrap_used, clippy::panic, reason = "what fails here fails the test")]

macro_rules! deployed {
    ($path:literal, $file:literal) => {
        ($path, include_str!(concat!("../../../deploy/", $file)))
    };
}

mod agent;
mod chart;
mod node;
mod preflight;
mod server;
mod taint;
mod web_identity;

use std::{net::IpAddr, path::PathBuf, time::Duration};

use http::Method;
use serde_json::{Value, json};
use tokio::time;

use self::{
    agent::Agent,
    server::{Body, Server, User},
};

/// Where `cargo xtask test apiserver` has the programs.
const BINARIES: &str = "KIAM_TEST_APISERVER";
/// Nothing here takes so long but a mistake, or a machine that does much else: most of it is the start of a server.
const PATIENCE: Duration = Duration::from_secs(120);
/// The API server sends a bookmark about each minute, and a token's file is read again after as long.
const MINUTES: Duration = Duration::from_secs(300);

const PERMITTED: &str = "iam.amazonaws.com/permitted";
const ROLE: &str = "iam.amazonaws.com/role";
const SILENCE: &str = "kiam_cluster_silence_seconds";
const ORDERS: &str = "/api/v1/namespaces/shop/pods/orders";

/// What `kubectl apply` makes of `deploy/`, but for the agent's own pods.
const DEPLOYED: [(&str, &str); 3] = [
    deployed!("/apis/rbac.authorization.k8s.io/v1/clusterroles", "clusterrole.yaml"),
    deployed!("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", "clusterrolebinding.yaml"),
    deployed!("/api/v1/namespaces/kube-system/serviceaccounts", "serviceaccount.yaml"),
];

/// A cluster with the agent's installation, one namespace, and the agent's own pod.
struct Cluster {
    server: Server,
    own_pod: Value,
}

// === impl Cluster ===

impl Cluster {
    /// `None` where there are no programs.
    async fn start() -> Option<Self> {
        let Some(binaries) = std::env::var_os(BINARIES).map(PathBuf::from) else {
            eprintln!("skipped: needs a real kube-apiserver: cargo xtask test apiserver");
            return None;
        };
        let server = Server::start(&binaries).await;
        apply(&server, &DEPLOYED).await;
        let namespace = json!({"metadata": {"name": "shop", "annotations": {PERMITTED: ".*"}}});
        server.create("/api/v1/namespaces", Body::Json(&namespace)).await;
        account(&server, "shop", "default").await;
        let own_pod = pod("kiam-agent-x", "kiam-agent", "n1", None);
        let path = "/api/v1/namespaces/kube-system/pods";
        let own_pod = server.create(path, Body::Json(&own_pod)).await;
        Some(Self { server, own_pod })
    }

    /// A token of the agent's, such as the kubelet gives it.
    async fn token(&self) -> String {
        self.server.token("kube-system", "kiam-agent", &self.own_pod).await
    }

    async fn agent(&self, flags: &[&str]) -> Agent {
        let agent = Agent::start(&self.server, &self.token().await, flags);
        eventually("ready", PATIENCE, || agent.is_ready()).await;
        agent
    }

    /// Runs the pod `shop/orders` at the agent's own address.
    async fn run_orders(&self, role: &str) {
        self.schedule("orders", role).await;
        self.publish("orders", &["127.0.0.1".parse().unwrap()]).await;
    }

    /// Schedules a pod of `shop` on the agent's node; returns its UID.
    async fn schedule(&self, name: &str, role: &str) -> String {
        let pod = pod(name, "default", "n1", Some(role));
        let pod = self.server.create("/api/v1/namespaces/shop/pods", Body::Json(&pod)).await;
        pod["metadata"]["uid"].as_str().unwrap().to_owned()
    }

    /// Says, as its kubelet, that it runs.
    async fn publish(&self, name: &str, addresses: &[IpAddr]) {
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let status = json!({"status": {"phase": "Running", "podIP": addresses[0], "podIPs": ips}});
        let path = format!("/api/v1/namespaces/shop/pods/{name}/status");
        self.change(User::Kubelet, &path, status).await;
    }

    /// Sets an annotation, as whoever owns the object.
    async fn annotate(&self, path: &str, name: &str, value: &str) {
        let change = json!({"metadata": {"annotations": {name: value}}});
        self.change(User::Admin, path, change).await;
    }

    async fn change(&self, user: User, path: &str, change: Value) {
        let changed = self.server.ask(user, Method::PATCH, path, Some(Body::Merge(&change)));
        changed.await.unwrap();
    }

    /// The first Event of the namespace that has this reason.
    async fn event(&self, reason: &str) -> Value {
        let path = "/apis/events.k8s.io/v1/namespaces/shop/events";
        let event = time::timeout(PATIENCE, async {
            loop {
                let list = self.server.ask(User::Admin, Method::GET, path, None).await.unwrap();
                let mut events = list["items"].as_array().unwrap().iter();
                if let Some(event) = events.find(|event| event["reason"] == reason) {
                    return event.clone();
                }
                time::sleep(Duration::from_millis(100)).await;
            }
        });
        event.await.expect("the agent tells why")
    }

    /// Waits until the server no longer takes a token, which it remembers for some seconds.
    async fn until_refused(&self, token: &str) {
        let refused = time::timeout(PATIENCE, async {
            while self.server.ask_with(token, "/api/v1/pods", None).await.is_ok() {
                time::sleep(Duration::from_millis(200)).await;
            }
        });
        assert!(refused.await.is_ok(), "the old token is still good");
        let refused = self.server.ask_with(token, "/api/v1/pods", None).await.unwrap_err();
        assert_eq!(refused.0, 401, "{refused:?}");
    }

    /// A delete by its owner gives a pod time; one by its kubelet is the end.
    async fn delete(&self, user: User, path: &str) {
        let now = json!({"gracePeriodSeconds": 0});
        let options = (user == User::Kubelet).then_some(Body::Json(&now));
        self.server.ask(user, Method::DELETE, path, options).await.unwrap();
    }
}

fn pod(name: &str, account: &str, node: &str, role: Option<&str>) -> Value {
    json!({
        "metadata": {"name": name, "annotations": role.map(|role| json!({ROLE: role}))},
        "spec": {
            "nodeName": node, "serviceAccountName": account,
            "containers": [{"name": "main", "image": "main"}],
        },
    })
}

/// `kubectl apply` of files with one or more documents.
async fn apply(server: &Server, files: &[(&str, &str)]) {
    for (path, file) in files {
        for document in file.split("\n---\n") {
            server.create(path, Body::Yaml(document)).await;
        }
    }
}

async fn account(server: &Server, namespace: &str, name: &str) {
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
    server.create(&path, Body::Json(&json!({"metadata": {"name": name}}))).await;
}

async fn eventually(what: &str, patience: Duration, holds: impl Fn() -> bool) {
    let waited = time::timeout(patience, async {
        while !holds() {
            time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(waited.await.is_ok(), "never came: {what}");
}

async fn comes(agent: &Agent, status: u16, body: &str) {
    let wanted = (status, body.to_owned());
    eventually(&format!("{wanted:?}"), PATIENCE, || agent.role() == wanted).await;
}

#[tokio::test]
async fn with_the_rights_of_deploy_alone_pods_are_followed_from_scheduling_to_their_end() {
    let Some(cluster) = Cluster::start().await else { return };
    let agent = cluster.agent(&[]).await;
    cluster.run_orders("reader").await;
    comes(&agent, 200, "reader").await;
    eventually("its credentials", PATIENCE, || agent.gives("reader")).await;
    let elsewhere = pod("elsewhere", "default", "n2", Some("reader"));
    cluster.server.create("/api/v1/namespaces/shop/pods", Body::Json(&elsewhere)).await;
    cluster.annotate(ORDERS, ROLE, "writer").await;
    comes(&agent, 200, "writer").await;
    assert!((agent.metric("kiam_cluster_pods") - 2.0).abs() < 0.1, "its own pod and this one");

    let shop = "/api/v1/namespaces/shop";
    cluster.annotate(shop, PERMITTED, "reader").await;
    comes(&agent, 404, "").await;
    let event = cluster.event("RoleForbidden").await;
    assert_eq!(event["regarding"]["name"], "orders", "{event}");
    assert_eq!(event["reportingController"], "kiam-agent", "{event}");
    cluster.annotate(shop, PERMITTED, "arn:.*/(reader|writer)").await;
    comes(&agent, 200, "writer").await;

    cluster.delete(User::Admin, ORDERS).await;
    cluster.annotate(ORDERS, ROLE, "reader").await;
    comes(&agent, 200, "reader").await;
    cluster.delete(User::Kubelet, ORDERS).await;
    comes(&agent, 404, "").await;
}

#[tokio::test]
async fn the_agents_rights_end_where_the_manifests_do() {
    let Some(cluster) = Cluster::start().await else { return };
    let token = cluster.token().await;
    for (path, allowed) in [
        ("/api/v1/pods", true),
        ("/api/v1/namespaces", true),
        ("/api/v1/namespaces/shop/pods", true),
        ("/apis/events.k8s.io/v1/events", false),
        ("/api/v1/secrets", false),
        ("/api/v1/serviceaccounts", false),
        ("/api/v1/nodes", false),
        ("/api/v1/configmaps", false),
        ("/apis/apps/v1/daemonsets", false),
    ] {
        match cluster.server.ask_with(&token, path, None).await {
            Ok(_) => assert!(allowed, "{path}"),
            Err((status, message)) => assert!(!allowed && status == 403, "{path}: {message}"),
        }
    }
}

#[tokio::test]
async fn a_server_that_restarts_with_its_history_compacted_is_caught_up_with() {
    let Some(mut cluster) = Cluster::start().await else { return };
    cluster.run_orders("reader").await;
    let agent = cluster.agent(&[]).await;
    comes(&agent, 200, "reader").await;
    let expired = r#"kiam_cluster_watch_restarts_total{resource="Pods",reason="Expired"}"#;
    assert!(agent.metric(expired) < 0.5);

    // What follows is newer than anything that the agent has seen of pods.
    let other = json!({"metadata": {"name": "other"}});
    cluster.server.create("/api/v1/namespaces", Body::Json(&other)).await;
    cluster.server.kill();
    eventually("a watch that ended", PATIENCE, || {
        let reasons = ["Closed", "Failed"].map(|reason| expired.replace("Expired", reason));
        reasons.iter().any(|name| agent.metric(name) > 0.5)
    })
    .await;
    assert_eq!(agent.role(), (200, "reader".to_owned()), "what is known stays");
    agent.freeze();
    cluster.server.resume().await;
    cluster.annotate(ORDERS, ROLE, "writer").await;
    cluster.server.compact();
    agent.thaw();
    comes(&agent, 200, "writer").await;
    assert!(agent.metric(expired) > 0.5, "the server refused the old version");
}

#[tokio::test]
async fn a_quiet_cluster_is_no_outage_and_a_busy_one_shows_bookmarks() {
    let Some(cluster) = Cluster::start().await else { return };
    cluster.run_orders("reader").await;
    let agent = cluster.agent(&["--sync-interval=1h"]).await;
    comes(&agent, 200, "reader").await;
    // While no pod changes, the server has no newer version to tell, and says nothing.
    let silent = r#"kiam_cluster_watch_restarts_total{resource="Pods",reason="Stalled"}"#;
    eventually("a silent watch", MINUTES, || agent.metric(silent) > 0.5).await;
    // Of the other kinds, whose 75 s are up to a tenth shorter or longer, too.
    eventually("the lists after it", PATIENCE, || agent.metric(SILENCE) < 20.0).await;
    assert!(!agent.said("Requests to the Kubernetes API fail"));

    let bookmarks = r#"kiam_cluster_events_total{resource="Pods",kind="Bookmark"}"#;
    assert!(agent.metric(bookmarks) < 0.5);
    let elsewhere = pod("elsewhere", "default", "n2", None);
    cluster.server.create("/api/v1/namespaces/shop/pods", Body::Json(&elsewhere)).await;
    eventually("a bookmark", MINUTES, || agent.metric(bookmarks) > 0.5).await;
    assert_eq!(agent.role(), (200, "reader".to_owned()));
}

#[tokio::test]
async fn by_source_addresses_nobody_is_answered_while_the_server_has_lost_etcd() {
    let Some(cluster) = Cluster::start().await else { return };
    cluster.run_orders("reader").await;
    let agent = cluster.agent(&["--sync-interval=2s"]).await;
    comes(&agent, 200, "reader").await;
    cluster.server.freeze_etcd(true);
    eventually("a refusal", MINUTES, || agent.role().0 == 403).await;
    assert!(agent.metric(SILENCE) >= 90.0);
    // Whoever asks for no more gets what was there, all the time.
    let cached = "/api/v1/pods?resourceVersion=0&fieldSelector=spec.nodeName%3Dn1";
    let cached = cluster.server.ask(User::Admin, Method::GET, cached, None).await.unwrap();
    assert!(cached["items"].as_array().unwrap().len() > 1, "{cached}");
    cluster.server.freeze_etcd(false);
    comes(&agent, 200, "reader").await;
}

#[tokio::test]
async fn a_rotated_token_is_taken_up() {
    let Some(cluster) = Cluster::start().await else { return };
    cluster.run_orders("reader").await;
    let agent = cluster.agent(&["--sync-interval=2s"]).await;
    let old = cluster.token().await;
    let successor = pod("kiam-agent-y", "kiam-agent", "n1", None);
    let path = "/api/v1/namespaces/kube-system/pods";
    let successor = cluster.server.create(path, Body::Json(&successor)).await;
    agent.rotate(&cluster.server.token("kube-system", "kiam-agent", &successor).await);
    // A token ends with the pod that it is bound to, as it would at its time.
    cluster.delete(User::Kubelet, &format!("{path}/kiam-agent-x")).await;
    cluster.until_refused(&old).await;

    let lists = r#"kiam_cluster_lists_total{resource="Pods",outcome="Taken"}"#;
    // Whether a list was refused meanwhile depends on when the agent read the file again. From now on the new token
    // alone is good for one.
    let taken = agent.metric(lists);
    eventually("lists again", MINUTES, || agent.metric(lists) > taken + 1.5).await;
    assert_eq!(agent.role(), (200, "reader".to_owned()));
}

//! The startup taint of a node, and who may take it off.

use serde_json::{Value, json};

use super::{
    Agent, Cluster, Method, PATIENCE, User, apply, eventually,
    server::{Body, Server},
};

const NODE: &str = "/api/v1/nodes/n1";
const KEY: &str = "kiam.example.com/agent-not-ready";
const FLAG: &str = "--startup-taint=kiam.example.com/agent-not-ready";

/// `kubectl apply -k deploy/startup-taint`; not the rules that come first: this server is older than they are.
const OWN_NODE: [(&str, &str); 2] = [
    deployed!("/apis/rbac.authorization.k8s.io/v1/clusterroles", "startup-taint/clusterrole.yaml"),
    deployed!(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        "startup-taint/clusterrolebinding.yaml"
    ),
];

/// The keys of the node's taints.
async fn keys(server: &Server) -> Vec<Value> {
    let node = server.ask(User::Admin, Method::GET, NODE, None).await.unwrap();
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints.iter().map(|taint| taint["key"].clone()).collect()
}

#[tokio::test]
async fn the_startup_taint_goes_as_soon_as_the_agent_may_take_it_off() {
    let Some(cluster) = Cluster::start().await else { return };
    let server = &cluster.server;
    let taint = |key, effect| json!({"key": key, "effect": effect});
    let taints =
        [taint(KEY, "NoSchedule"), taint("dedicated", "NoSchedule"), taint(KEY, "NoExecute")];
    let node = json!({"metadata": {"name": "n1"}, "spec": {"taints": taints}});
    server.create("/api/v1/nodes", Body::Json(&node)).await;
    let before = keys(server).await;
    let agent: Agent = cluster.agent(&[FLAG]).await;
    eventually("what to do", PATIENCE, || {
        agent.said("apply deploy/startup-taint, which grants it")
    })
    .await;
    assert_eq!(keys(server).await, before);
    apply(server, &OWN_NODE).await;
    eventually("the taint's end", PATIENCE, || agent.said("Removed the startup taint")).await;
    // The server's own stay too, such as of a node that no kubelet has called ready.
    let rest: Vec<Value> = before.into_iter().filter(|key| key != KEY).collect();
    assert!(rest.contains(&json!("dedicated")), "{rest:?}");
    assert_eq!(keys(server).await, rest);
}

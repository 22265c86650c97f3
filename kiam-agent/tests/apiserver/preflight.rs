//! What `kiam-agent preflight` says of the agent's rights.

use std::{fs, process::Command};

use http::Method;
use serde_json::{Value, json};

use super::{Body, Cluster, User, apply};

const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/kiam-agent";
/// `kubectl apply -k deploy/evict-older-pods`.
const EVICTIONS: [(&str, &str); 2] = [
    deployed!(
        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        "evict-older-pods/clusterrole.yaml"
    ),
    deployed!(
        "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        "evict-older-pods/clusterrolebinding.yaml"
    ),
];

/// Runs preflight with the agent's own token, and returns its line on the agent's rights.
async fn rights(cluster: &Cluster, flags: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let (file, kubeconfig) = (folder.path().join("token"), folder.path().join("kubeconfig"));
    fs::write(&file, cluster.token().await).unwrap();
    let text = cluster.server.kubeconfig(&json!({"tokenFile": file})).to_string();
    fs::write(&kubeconfig, text).unwrap();
    let mut preflight = Command::new(lab::agent_binary().unwrap());
    preflight.env_clear().arg("preflight").arg("--kubeconfig").arg(kubeconfig);
    preflight.args(["--interceptor=off", "--identity=source-ip", "--output=json"]);
    preflight.args(["--host=127.0.0.1", "--node-name=n1", "--region=eu-west-1"]);
    preflight.args(["--role-base-arn=arn:aws:iam::123456789012:role/"]).args(flags);
    // Neither is there: their own lines say so.
    preflight.args(["--upstream=http://127.0.0.1:9", "--sts-endpoint=http://127.0.0.1:9"]);
    let output = tokio::task::spawn_blocking(move || preflight.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}: {said}", output.status));
    let mut checks = report["checks"].as_array().unwrap().iter();
    checks.find(|check| check["check"] == "api-rights").unwrap().clone()
}

/// Removes a right from what the chart and `deploy/` grant; `None`: grants all again.
async fn take_away(cluster: &Cluster, right: Option<(&str, &str)>) {
    let (_, file) = super::DEPLOYED[0];
    let mut role: Value = serde_saphyr::from_str(file).unwrap();
    if let Some((resource, verb)) = right {
        let mut split = Vec::new();
        for rule in role["rules"].as_array().unwrap() {
            // One rule for each resource, so that no other loses the verb.
            for named in rule["resources"].as_array().unwrap() {
                let mut one = rule.clone();
                one["resources"] = json!([named]);
                if named == resource {
                    one["verbs"].as_array_mut().unwrap().retain(|it| it != verb);
                }
                split.push(one);
            }
        }
        assert!(split.iter().any(|rule| rule["resources"][0] == resource), "{resource}");
        role["rules"] = split.into();
    }
    let rules = json!({"rules": role["rules"]});
    let changed = cluster.server.ask(User::Admin, Method::PATCH, ROLE, Some(Body::Merge(&rules)));
    changed.await.unwrap();
}

/// Waits until the line is of this verdict: the server learns of changed rights by a watch of its own.
async fn assert_line(cluster: &Cluster, flags: &[&str], verdict: &str, says: &str, remedy: &str) {
    let mut line = Value::Null;
    for _ in 0..20 {
        line = rights(cluster, flags).await;
        let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        let is_right = line["verdict"] == verdict && text("finding").contains(says);
        if is_right && text("remedy").contains(remedy) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    panic!("no {verdict} with {says:?} and {remedy:?}: {line}");
}

#[tokio::test]
async fn preflight_names_the_right_that_is_missing() {
    let Some(cluster) = Cluster::start().await else { return };
    assert_line(&cluster, &[], "ok", "all that these flags need", "").await;
    for (resource, verb, verdict, named) in [
        ("pods", "watch", "fail", "missing: watch pods"),
        ("namespaces", "list", "fail", "missing: list namespaces"),
        ("events", "create", "warn", "missing: create events.events.k8s.io"),
    ] {
        take_away(&cluster, Some((resource, verb))).await;
        assert_line(&cluster, &[], verdict, named, "deploy/clusterrole.yaml").await;
    }
    take_away(&cluster, None).await;
    assert_line(&cluster, &[], "ok", "all that these flags need", "").await;
    // A flag that needs more.
    let flags = ["--evict-older-pods"];
    let named = "missing: create pods/eviction";
    assert_line(&cluster, &flags, "fail", named, "deploy/evict-older-pods").await;
    apply(&cluster.server, &EVICTIONS).await;
    assert_line(&cluster, &flags, "ok", "all that these flags need", "").await;
}

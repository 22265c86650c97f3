//! The Helm chart, installed by Helm's own code in the real API server, beside what `kubectl apply -k` makes there.

use std::{collections::BTreeMap, fs, path::Path};

use http::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::{
    command::{run, workspace},
    helm::{CHART, Helm, kustomization},
};

use super::{BINARIES, Server, User};

const NAMESPACE: &str = "kube-system";
/// What the chart, or a kustomization, makes, and Helm's own records.
const LISTS: [&str; 5] = [
    "/apis/apps/v1/daemonsets",
    "/api/v1/serviceaccounts",
    "/apis/rbac.authorization.k8s.io/v1/clusterroles",
    "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "/api/v1/secrets",
];

/// Objects by list and name.
type Objects = BTreeMap<String, Value>;

/// An empty cluster, and who asks it.
struct Installation {
    server: Server,
    helm: Helm,
    folder: TempDir,
}

// === impl Installation ===

impl Installation {
    /// `None` where a program is missing.
    async fn start() -> Option<Self> {
        let Some(binaries) = std::env::var_os(BINARIES) else {
            eprintln!("skipped: needs a real kube-apiserver: cargo xtask test apiserver");
            return None;
        };
        let helm = Helm::of_test()?;
        let server = Server::start(Path::new(&binaries)).await;
        let folder = tempfile::tempdir().unwrap();
        let kubeconfig = server.kubeconfig(&json!({"token": User::Admin.token()}));
        fs::write(folder.path().join("kubeconfig"), kubeconfig.to_string()).unwrap();
        // The API server is older than the chart allows.
        copy(&workspace().join(CHART), &folder.path().join("chart"));
        let file = folder.path().join("chart/Chart.yaml");
        let text = fs::read_to_string(&file).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with("kubeVersion: "));
        fs::write(&file, lines.collect::<Vec<_>>().join("\n")).unwrap();
        Some(Self { server, helm, folder })
    }

    /// Has Helm do something with the release.
    fn helm(&self, call: Value) -> Result<Value, String> {
        let mut call = call;
        call["kubeconfig"] = json!(self.folder.path().join("kubeconfig"));
        call["namespace"] = json!(NAMESPACE);
        call["name"] = json!("kiam-agent");
        self.helm.calls(&[call]).unwrap().remove(0)
    }

    /// Installs or upgrades.
    fn release(&self, verb: &str, values: &Value) -> Result<Value, String> {
        let chart = self.folder.path().join("chart");
        self.helm(json!({"do": verb, "chart": chart, "values": values}))
    }

    /// `kubectl apply -k` or `delete -k`.
    fn kubectl(&self, verb: &str, text: &Value) {
        let folder = kustomization(text).unwrap();
        let mut kubectl = self.helm.kubectl();
        kubectl.arg(verb).arg("-k").arg(folder.path());
        run(kubectl.arg("--kubeconfig").arg(self.folder.path().join("kubeconfig"))).unwrap();
    }

    /// What kubectl makes of this; nothing of it is left.
    async fn applied(&self, text: &Value) -> Objects {
        self.kubectl("apply", text);
        let objects = self.objects().await;
        self.kubectl("delete", text);
        assert_eq!(self.names().await, [""; 0], "kubectl has deleted all");
        objects
    }

    /// Everything that has to do with the agent.
    async fn objects(&self) -> Objects {
        let mut objects = Objects::new();
        for path in LISTS {
            let list = self.server.ask(User::Admin, Method::GET, path, None).await.unwrap();
            for object in list["items"].as_array().unwrap() {
                let name = object["metadata"]["name"].as_str().unwrap();
                if name.contains("kiam") {
                    objects.insert(format!("{path}/{name}"), essence(object));
                }
            }
        }
        objects
    }

    async fn names(&self) -> Vec<String> {
        self.objects().await.into_keys().collect()
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        // Of links, what they lead to.
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), &to).unwrap();
        }
    }
}

/// An object without what differs by time, and by who made it.
fn essence(object: &Value) -> Value {
    let mut object = object.clone();
    let metadata = &object["metadata"];
    object["metadata"] = json!({"name": metadata["name"], "namespace": metadata["namespace"]});
    object.as_object_mut().unwrap().remove("status");
    object
}

/// Without Helm's own records.
fn without_records(objects: Objects) -> Objects {
    objects.into_iter().filter(|(name, _)| !name.contains("sh.helm.release")).collect()
}

fn args(objects: &Objects) -> Vec<&str> {
    let agent = &objects["/apis/apps/v1/daemonsets/kiam-agent"]["spec"]["template"]["spec"];
    let args = agent["containers"][0]["args"].as_array().unwrap();
    args.iter().map(|arg| arg.as_str().unwrap()).collect()
}

/// The API server of the tests is too old to surge.
fn values(more: &Value) -> Value {
    let mut values = json!({"updateStrategy": {"type": "OnDelete", "rollingUpdate": null}});
    values.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    values
}

#[tokio::test]
async fn helm_installs_upgrades_rolls_back_and_removes_what_kubectl_applies() {
    let Some(cluster) = Installation::start().await else { return };
    let strategy =
        json!([{"op": "replace", "path": "/spec/updateStrategy", "value": {"type": "OnDelete"}}]);
    let patch = json!({"target": {"kind": "DaemonSet"}, "patch": strategy.to_string()});
    let agent = json!({"resources": ["../../deploy"], "patches": [patch]});
    let wanted = cluster.applied(&agent).await;
    let removal = cluster.applied(&json!({"resources": ["../../deploy/uninstall"]})).await;
    assert_eq!((wanted.len(), removal.len()), (4, 1));

    cluster.kubectl("apply", &agent);
    let refused = cluster.release("install", &values(&json!({}))).unwrap_err();
    assert!(refused.contains("invalid ownership metadata"), "{refused}");
    cluster.kubectl("delete", &agent);

    cluster.release("install", &values(&json!({}))).unwrap();
    assert_eq!(without_records(cluster.objects().await), wanted);

    let changed = json!({"logLevel": "debug", "evictOlderPods": true});
    cluster.release("upgrade", &values(&changed)).unwrap();
    let upgraded = without_records(cluster.objects().await);
    assert_eq!(upgraded.len(), 6, "{upgraded:?}");
    let flags = args(&upgraded);
    assert!(flags.contains(&"--level=debug") && flags.contains(&"--evict-older-pods"), "{flags:?}");

    cluster.helm(json!({"do": "rollback"})).unwrap();
    assert_eq!(without_records(cluster.objects().await), wanted);

    cluster.release("upgrade", &values(&json!({"uninstall": true}))).unwrap();
    assert_eq!(without_records(cluster.objects().await), removal);
    cluster.helm(json!({"do": "uninstall"})).unwrap();
    assert_eq!(cluster.names().await, [""; 0]);
}

#[tokio::test]
async fn helm_changes_nothing_where_the_cluster_is_too_old() {
    let Some(cluster) = Installation::start().await else { return };
    let chart = workspace().join(CHART);
    let refused = cluster.helm(json!({"do": "install", "chart": chart, "values": {}})).unwrap_err();
    assert!(refused.contains("requires kubeVersion: >=1.22.0-0"), "{refused}");
    // Without that line the surge is no field of the API server's.
    let refused = cluster.release("install", &json!({})).unwrap_err();
    assert!(refused.contains("unknown field \"maxSurge\""), "{refused}");
    let tokens = values(&json!({"webIdentity": {"tokens": "agent"}}));
    let refused = cluster.release("install", &tokens).unwrap_err();
    assert!(refused.contains("no matches for kind \"ValidatingAdmissionPolicy\""), "{refused}");
    assert_eq!(cluster.names().await, [""; 0]);
}

//! The objects that matter: workloads with their containers, pods that ask for roles, and namespaces.

use std::collections::BTreeMap;

use serde_json::Value;

use super::input::{Object, Place};

/// A workload, or a pod by itself.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) place: Place,
    pub(super) kind: String,
    /// `None` where the manifest leaves it to `kubectl`.
    pub(super) namespace: Option<String>,
    pub(super) name: String,
    /// Whether a controller made it: the controller's own manifest says the same.
    pub(super) is_owned: bool,
    /// The annotations of its pods.
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) service_account: String,
    pub(super) host_network: bool,
    /// Whether its pods have ended.
    pub(super) has_ended: bool,
    /// Whether it chooses nodes.
    pub(super) is_placed: bool,
    pub(super) containers: Vec<Container>,
    pub(super) init_containers: Vec<Container>,
}

/// A container.
#[derive(Clone, Debug, Default)]
pub(super) struct Container {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) command: Vec<String>,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<EnvVar>,
    /// ConfigMaps and Secrets whose keys are variables.
    pub(super) env_from: Vec<String>,
    /// The commands of its probes.
    pub(super) probes: Vec<(&'static str, Vec<String>)>,
}

/// An environment variable.
#[derive(Clone, Debug)]
pub(super) struct EnvVar {
    pub(super) name: String,
    pub(super) value: EnvValue,
    /// As the manifest has it.
    pub(super) entry: Value,
}

/// The value of a variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EnvValue {
    Text(String),
    /// A field of the pod, such as `status.hostIP`.
    Field(String),
    /// A key of a ConfigMap or a Secret.
    Elsewhere(String),
}

/// A namespace.
#[derive(Clone, Debug)]
pub(super) struct NamespaceObject {
    pub(super) name: String,
    pub(super) annotations: BTreeMap<String, String>,
}

/// What the input has.
#[derive(Clone, Debug, Default)]
pub(super) struct Inventory {
    pub(super) workloads: Vec<Workload>,
    pub(super) namespaces: Vec<NamespaceObject>,
    /// How many objects of other kinds there are.
    pub(super) others: usize,
    /// How many documents have no kind, such as Helm's values.
    pub(super) without_kind: usize,
}

// === impl Inventory ===

impl Inventory {
    pub(super) fn new(objects: &[Object]) -> Self {
        let mut inventory = Self::default();
        for object in objects {
            let Some(kind) = object.value["kind"].as_str() else {
                inventory.without_kind += 1;
                continue;
            };
            match template(kind) {
                _ if kind == "Namespace" => inventory.namespaces.push(namespace(&object.value)),
                Some(path) => inventory.workloads.push(workload(object, kind, path)),
                None => inventory.others += 1,
            }
        }
        inventory
    }
}

/// Where a kind has the metadata and the spec of its pods.
fn template(kind: &str) -> Option<&'static str> {
    match kind {
        "Pod" => Some(""),
        "DaemonSet"
        | "Deployment"
        | "StatefulSet"
        | "ReplicaSet"
        | "ReplicationController"
        | "Job" => Some("/spec/template"),
        "CronJob" => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

fn workload(object: &Object, kind: &str, path: &str) -> Workload {
    let value = &object.value;
    let pod = value.pointer(path).unwrap_or(&Value::Null);
    let spec = &pod["spec"];
    let owners = value["metadata"]["ownerReferences"].as_array();
    let is_owned = owners.is_some_and(|owners| owners.iter().any(|it| it["controller"] == true));
    let account = ["serviceAccountName", "serviceAccount"].into_iter().find_map(|name| {
        spec[name].as_str().filter(|account| !account.is_empty()).map(str::to_owned)
    });
    let phase = value["status"]["phase"].as_str();
    Workload {
        place: object.place.clone(),
        kind: kind.to_owned(),
        namespace: value["metadata"]["namespace"].as_str().map(str::to_owned),
        name: name(&value["metadata"]),
        is_owned,
        annotations: texts(&pod["metadata"]["annotations"]),
        service_account: account.unwrap_or_else(|| "default".to_owned()),
        host_network: spec["hostNetwork"] == true,
        has_ended: kind == "Pod" && matches!(phase, Some("Succeeded" | "Failed")),
        is_placed: ["nodeSelector", "affinity", "nodeName"].iter().any(|it| !is_empty(&spec[it])),
        containers: containers(&spec["containers"]),
        init_containers: containers(&spec["initContainers"]),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.values().all(is_empty),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// `metadata.name`, or what the API server makes it of.
fn name(metadata: &Value) -> String {
    let named = metadata["name"].as_str().or(metadata["generateName"].as_str());
    named.unwrap_or("(unnamed)").to_owned()
}

fn namespace(value: &Value) -> NamespaceObject {
    let metadata = &value["metadata"];
    NamespaceObject { name: name(metadata), annotations: texts(&metadata["annotations"]) }
}

fn texts(map: &Value) -> BTreeMap<String, String> {
    let entries = map.as_object().into_iter().flatten();
    entries.map(|(name, value)| (name.clone(), text(value))).collect()
}

/// A scalar as text. YAML reads an unquoted port as a number, and Helm's charts print some unquoted.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn words(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(text).collect()
}

fn containers(list: &Value) -> Vec<Container> {
    list.as_array().into_iter().flatten().map(container).collect()
}

fn container(value: &Value) -> Container {
    let env_from = value["envFrom"].as_array().into_iter().flatten();
    let probe = |name: &'static str| {
        let words = words(&value[name]["exec"]["command"]);
        (!words.is_empty()).then_some((name, words))
    };
    Container {
        name: name(value),
        image: text(&value["image"]),
        command: words(&value["command"]),
        args: words(&value["args"]),
        env: value["env"].as_array().into_iter().flatten().map(env_var).collect(),
        env_from: env_from.map(reference).collect(),
        probes: ["startupProbe", "livenessProbe", "readinessProbe"]
            .into_iter()
            .filter_map(probe)
            .collect(),
    }
}

fn env_var(entry: &Value) -> EnvVar {
    let from = &entry["valueFrom"];
    let value = match from["fieldRef"]["fieldPath"].as_str() {
        Some(path) => EnvValue::Field(path.to_owned()),
        None if from.is_null() => EnvValue::Text(text(&entry["value"])),
        None => EnvValue::Elsewhere(reference(from)),
    };
    EnvVar { name: text(&entry["name"]), value, entry: entry.clone() }
}

/// A ConfigMap or a Secret, by its kind and name.
fn reference(from: &Value) -> String {
    let kinds = [
        ("configMapKeyRef", "ConfigMap"),
        ("configMapRef", "ConfigMap"),
        ("secretKeyRef", "Secret"),
        ("secretRef", "Secret"),
    ];
    let found = kinds.into_iter().find_map(|(field, kind)| {
        let name = from[field]["name"].as_str()?;
        Some(format!("{kind} {name}"))
    });
    found.unwrap_or_else(|| "another source".to_owned())
}

// === impl Workload ===

impl Workload {
    /// Kind, namespace and name, for messages.
    pub(super) fn title(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{} {namespace}/{}", self.kind, self.name),
            None => format!("{} {}", self.kind, self.name),
        }
    }
}

//! Kubernetes objects, by kind and name, without what Helm adds to them.

use std::collections::BTreeMap;

use serde_json::Value;

/// Labels of the chart's own.
const LABELS: [&str; 4] = [
    "app.kubernetes.io/instance",
    "app.kubernetes.io/managed-by",
    "app.kubernetes.io/name",
    "helm.sh/chart",
];

/// What is deployed at once.
#[derive(Debug, PartialEq)]
pub(super) struct Objects(BTreeMap<String, Value>);

// === impl Objects ===

impl Objects {
    /// What Helm has rendered, by template.
    pub(super) fn rendered(templates: &Value) -> Self {
        let templates = templates.as_object().unwrap().iter();
        let manifests = templates.filter(|(name, _)| !name.ends_with("NOTES.txt"));
        Self::parse(manifests.map(|(_, text)| text.as_str().unwrap()))
    }

    /// Documents of these texts; none may say the same twice.
    pub(super) fn parse<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let mut objects = BTreeMap::new();
        for text in texts {
            let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
            for mut object in documents.into_iter().filter(|document| !document.is_null()) {
                let name = key(
                    object["kind"].as_str().unwrap(),
                    object["metadata"]["name"].as_str().unwrap(),
                );
                normalise(&mut object);
                assert!(objects.insert(name.clone(), object).is_none(), "{name} is there twice");
            }
        }
        Self(objects)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn get(&self, kind: &str, name: &str) -> &Value {
        self.0.get(&key(kind, name)).unwrap_or(&Value::Null)
    }

    pub(super) fn of_kind(&self, kind: &str) -> Vec<&Value> {
        self.0.values().filter(|object| object["kind"] == kind).collect()
    }

    /// The pod of a DaemonSet.
    pub(super) fn daemonset(&self, name: &str) -> &Value {
        &self.get("DaemonSet", name)["spec"]["template"]["spec"]
    }

    /// Compares one object after the other, so that a difference is short.
    pub(super) fn assert_same(&self, other: &Self, what: &str) {
        let names = |objects: &Self| objects.0.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other), "{what}");
        for (name, object) in &self.0 {
            let text = |object| serde_json::to_string_pretty(object).unwrap();
            assert_eq!(text(object), text(&other.0[name]), "{what}: {name}");
        }
    }
}

fn key(kind: &str, name: &str) -> String {
    format!("{kind} {name}")
}

/// Removes the chart's labels, and sorts what has no order: flags, volumes and their mounts.
fn normalise(object: &mut Value) {
    if let Some(metadata) = object["metadata"].as_object_mut()
        && let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut)
    {
        labels.retain(|name, _| !LABELS.contains(&name.as_str()));
        if labels.is_empty() {
            metadata.remove("labels");
        }
    }
    for list in ["volumes", "containers/0/args", "containers/0/volumeMounts"] {
        let list = object.pointer_mut(&format!("/spec/template/spec/{list}"));
        if let Some(list) = list.and_then(Value::as_array_mut) {
            list.sort_by_key(Value::to_string);
        }
    }
}

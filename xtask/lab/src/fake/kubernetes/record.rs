//! Pods, namespaces and ServiceAccounts in the API's words.

use std::net::IpAddr;

use serde_json::{Value, json};

const ROLE: &str = "iam.amazonaws.com/role";

/// What the API says about a pod.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct PodRecord {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub annotations: Vec<(String, String)>,
    /// `metadata.finalizers`: with one, the pod stays when it is evicted, and is only marked as terminating.
    pub finalizers: Vec<String>,
    /// Kind of the controller in `metadata.ownerReferences`, if it has one.
    pub controller: Option<String>,
    /// `spec.nodeName`; absent until it is scheduled.
    pub node: Option<String>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// `status.hostIP`.
    pub host_ip: Option<IpAddr>,
    /// `status.podIPs`; empty until the kubelet publishes them.
    pub ips: Vec<IpAddr>,
    /// `status.phase`.
    pub phase: String,
}

/// What the API says about a namespace.
#[derive(Clone, Debug)]
pub struct NamespaceRecord {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.annotations`.
    pub annotations: Vec<(String, String)>,
}

/// What the API says about a ServiceAccount.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct ServiceAccountRecord {
    pub namespace: String,
    pub name: String,
    pub annotations: Vec<(String, String)>,
}

// === impl PodRecord ===

impl PodRecord {
    /// A pod that is scheduled to `node` and has no address yet.
    #[must_use]
    pub fn scheduled(namespace: &str, name: &str, uid: &str, node: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: uid.to_owned(),
            annotations: Vec::new(),
            finalizers: Vec::new(),
            controller: None,
            node: Some(node.to_owned()),
            host_network: false,
            service_account: "default".to_owned(),
            host_ip: None,
            ips: Vec::new(),
            phase: "Pending".to_owned(),
        }
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Annotates it with this role.
    #[must_use]
    pub fn role(self, role: &str) -> Self {
        self.annotation(ROLE, role)
    }

    /// The role that it is annotated with; of several, the last.
    #[must_use]
    pub fn annotated_role(&self) -> Option<&str> {
        let mut annotations = self.annotations.iter().rev();
        annotations.find_map(|(key, value)| (key == ROLE).then_some(value.as_str()))
    }

    /// Gives it a controller of this kind.
    #[must_use]
    pub fn controller(mut self, kind: &str) -> Self {
        self.controller = Some(kind.to_owned());
        self
    }

    /// Gives it a finalizer.
    #[must_use]
    pub fn finalizer(mut self, name: &str) -> Self {
        self.finalizers.push(name.to_owned());
        self
    }

    /// The same pod, running with these addresses.
    #[must_use]
    pub fn running(mut self, ips: &[IpAddr]) -> Self {
        self.ips = ips.to_vec();
        "Running".clone_into(&mut self.phase);
        self
    }

    pub(super) fn to_json(&self) -> Value {
        let mut status = json!({ "phase": self.phase, "qosClass": "Burstable" });
        if let Some(ip) = self.host_ip {
            status["hostIP"] = json!(ip);
        }
        if let Some(ip) = self.ips.first() {
            status["podIP"] = json!(ip);
            status["podIPs"] = self.ips.iter().map(|ip| json!({ "ip": ip })).collect();
        }
        let mut spec = json!({
            "containers": [{ "name": "main", "image": "example.com/main" }],
            "serviceAccountName": self.service_account,
        });
        if let Some(node) = &self.node {
            spec["nodeName"] = json!(node);
        }
        if self.host_network {
            spec["hostNetwork"] = json!(true);
        }
        let mut metadata = metadata(&self.name, &self.annotations);
        metadata["namespace"] = json!(self.namespace);
        metadata["uid"] = json!(self.uid);
        if !self.finalizers.is_empty() {
            metadata["finalizers"] = json!(self.finalizers);
        }
        if let Some(kind) = &self.controller {
            metadata["ownerReferences"] = json!([{
                "apiVersion": "apps/v1", "kind": kind, "name": "owner", "uid": "owner", "controller": true,
            }]);
        }
        json!({ "kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec, "status": status })
    }
}

// === impl NamespaceRecord ===

impl NamespaceRecord {
    /// A namespace without annotations.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), annotations: Vec::new() }
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn to_json(&self) -> Value {
        let mut metadata = metadata(&self.name, &self.annotations);
        metadata["uid"] = json!(format!("namespace-{}", self.name));
        json!({
            "kind": "Namespace", "apiVersion": "v1", "metadata": metadata,
            "spec": { "finalizers": ["kubernetes"] }, "status": { "phase": "Active" },
        })
    }
}

// === impl ServiceAccountRecord ===

impl ServiceAccountRecord {
    /// A ServiceAccount without annotations.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        let [namespace, name] = [namespace, name].map(str::to_owned);
        Self { namespace, name, annotations: Vec::new() }
    }

    /// Adds an annotation, such as `eks.amazonaws.com/role-arn`.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn to_json(&self) -> Value {
        let mut metadata = metadata(&self.name, &self.annotations);
        metadata["namespace"] = json!(self.namespace);
        metadata["uid"] = json!(format!("serviceaccount-{}-{}", self.namespace, self.name));
        json!({ "kind": "ServiceAccount", "apiVersion": "v1", "metadata": metadata })
    }
}

pub(super) fn node(name: &str, taints: &[Value]) -> Value {
    let mut metadata = metadata(name, &[]);
    metadata["uid"] = json!(format!("node-{name}"));
    json!({ "kind": "Node", "apiVersion": "v1", "metadata": metadata, "spec": { "taints": taints } })
}

fn metadata(name: &str, annotations: &[(String, String)]) -> Value {
    let mut metadata = json!({ "name": name, "creationTimestamp": "2026-01-01T00:00:00Z" });
    if !annotations.is_empty() {
        metadata["annotations"] =
            annotations.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
    }
    metadata
}

/// What `Accept: …;as=PartialObjectMetadata` asks for: `object` without all but its metadata.
pub(super) fn metadata_only(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

/// The API's error body.
pub(super) fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

//! API objects to records.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1;
use kube::{ResourceExt as _, api::ObjectMeta};

use crate::pods::{Namespace, Pod, PodUid};

const ROLE: &str = "iam.amazonaws.com/role";
const SESSION_NAME: &str = "iam.amazonaws.com/session-name";
const EXTERNAL_ID: &str = "iam.amazonaws.com/external-id";
const PERMITTED: &str = "iam.amazonaws.com/permitted";
const CONFIG_HASH: &str = "kubernetes.io/config.hash";
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod's record; `None` for an object without name or UID, which no API server sends.
pub(super) fn pod(object: v1::Pod) -> Option<Pod> {
    let resource_version = version(&object.metadata);
    let annotations = object.annotations();
    let mirror = annotations.contains_key(CONFIG_MIRROR);
    let config_hash = annotation(annotations, CONFIG_HASH).filter(|_| mirror);
    let role = annotation(annotations, ROLE);
    let session_name = annotation(annotations, SESSION_NAME);
    let external_id = annotation(annotations, EXTERNAL_ID);
    let spec = object.spec.unwrap_or_default();
    let status = object.status.unwrap_or_default();
    let addresses = status.pod_ips.unwrap_or_default();
    let mut addresses: Vec<_> =
        addresses.iter().filter_map(|address| address.ip.parse().ok()).collect();
    if let Some(address) = status.pod_ip.and_then(|address| address.parse().ok())
        && !addresses.contains(&address)
    {
        addresses.push(address);
    }
    Some(Pod {
        uid: PodUid::new(object.metadata.uid.as_deref()?),
        namespace: object.metadata.namespace?,
        name: object.metadata.name?,
        resource_version,
        node: spec.node_name.filter(|node| !node.is_empty()),
        host_ip: status.host_ip.and_then(|address| address.parse().ok()),
        addresses,
        host_network: spec.host_network.unwrap_or_default(),
        live: !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        config_hash,
        role,
        session_name,
        external_id,
    })
}

/// A namespace's record, from its metadata.
pub(super) fn namespace(metadata: &ObjectMeta) -> Option<Namespace> {
    let none = BTreeMap::new();
    let annotations = metadata.annotations.as_ref().unwrap_or(&none);
    Some(Namespace {
        name: metadata.name.clone()?,
        resource_version: version(metadata),
        permitted: annotation(annotations, PERMITTED),
    })
}

/// Versions are opaque by contract, and numbers in every API server there is.
pub(super) fn version(metadata: &ObjectMeta) -> Option<u64> {
    metadata.resource_version.as_deref()?.parse().ok()
}

/// An empty annotation is as good as none, as in kiam.
fn annotation(annotations: &BTreeMap<String, String>, name: &str) -> Option<String> {
    annotations.get(name).filter(|text| !text.trim().is_empty()).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_is_reduced_to_what_decides() {
        let object = serde_json::from_value(serde_json::json!({
            "metadata": {
                "uid": "0F8FAD5B-D9CB-469F-A165-70867728950E", "name": "a", "namespace": "default",
                "resourceVersion": "7",
                "annotations": { ROLE: "reader", EXTERNAL_ID: " ", CONFIG_HASH: "forged" }
            },
            "spec": { "nodeName": "node-1", "containers": [] },
            "status": { "phase": "Pending", "podIP": "10.0.0.1",
                        "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }, { "ip": "garbage" }] }
        }));
        let pod = pod(object.unwrap()).unwrap();
        assert_eq!(pod.uid.to_string(), "0f8fad5b-d9cb-469f-a165-70867728950e");
        assert_eq!(pod.resource_version, Some(7));
        assert_eq!(pod.addresses.len(), 2);
        assert_eq!(pod.role.as_deref(), Some("reader"));
        assert_eq!((pod.external_id, pod.config_hash), (None, None));
        assert!(pod.live && !pod.host_network);
    }

    #[test]
    fn object_without_uid_is_no_pod() {
        assert_eq!(pod(v1::Pod::default()), None);
    }
}

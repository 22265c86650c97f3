//! Parses Kubernetes objects from JSON into the records that decide about credentials.
//!
//! Each object is parsed by itself, so that a malformed one affects no other. A malformed object is skipped as a whole:
//! a pod with an invalid address must not pass for a pod without one.

use std::{collections::HashMap, net::IpAddr};

use kube::core::{Status, WatchEvent};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use super::{
    filters::{
        ALLOWED_ROLES, AnnotationSpec, CONFIG_HASH, CONFIG_MIRROR, EXTERNAL_ID, IMDSV2, PERMITTED,
        ROLE, ROLE_ARN, SESSION_NAME, SESSION_POLICIES,
    },
    sieve::InvalidJson,
};
use kiam_core::{
    pods::{Annotation, InvalidPodUid, Namespace, Pod, PodUid, ServiceAccount, TooLong},
    role::AccountName,
};

/// The ServiceAccount of pods without `spec.serviceAccountName`.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Why an object or a list is malformed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    #[error("not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    InvalidJson(#[from] InvalidJson),
    #[error("not a watch event")]
    Event,
    #[error(transparent)]
    Uid(#[from] InvalidPodUid),
    #[error("address {0:?} is not an IP address")]
    Address(String),
    #[error("annotation {0} is not a string")]
    Annotation(&'static str),
}

/// The metadata of a page of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) version: String,
    /// The token of the next page, if there is one.
    pub(super) next: Option<String>,
}

#[derive(Deserialize)]
struct ListObject {
    metadata: ListMetadata,
    /// The items are parsed one by one as they arrive. Go may encode an empty list as null; an object without the field is
    /// not a list, and must not pass for an empty one, which would delete every record.
    #[serde(rename = "items", deserialize_with = "Option::deserialize")]
    _items: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    resource_version: String,
    r#continue: Option<String>,
}

#[derive(Deserialize)]
struct PodObject {
    metadata: Metadata,
    spec: Option<PodSpec>,
    status: Option<PodStatus>,
}

#[derive(Deserialize)]
struct MetadataObject {
    metadata: Metadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
    resource_version: Option<String>,
    deletion_timestamp: Option<String>,
    annotations: Option<HashMap<String, Value>>,
    owner_references: Option<Vec<Owner>>,
}

#[derive(Deserialize)]
struct Owner {
    controller: Option<bool>,
    #[serde(default)]
    kind: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: Option<String>,
    host_network: Option<bool>,
    service_account_name: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "hostIP")]
    host_ip: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: Option<String>,
}

/// Parses the metadata of a list's page.
pub(super) fn page(document: &[u8]) -> Result<Page, Malformed> {
    let ListMetadata { resource_version, r#continue } =
        serde_json::from_slice::<ListObject>(document)?.metadata;
    let next = r#continue.filter(|token| !token.is_empty());
    Ok(Page { version: resource_version, next })
}

/// Parses a line of a watch: an event, or the error that ends the watch.
pub(super) fn event(line: &[u8]) -> Result<WatchEvent<Value>, Malformed> {
    match serde_json::from_slice(line) {
        Ok(event) => Ok(event),
        Err(error) => match serde_json::from_slice::<Status>(line) {
            // A status has no required fields, so that any JSON object parses as one.
            Ok(status) if status.code == 0 => Err(Malformed::Event),
            Ok(status) => Ok(WatchEvent::Error(status.boxed())),
            Err(_) => Err(error.into()),
        },
    }
}

/// Parses a pod.
pub(super) fn pod(object: &Value) -> Result<Pod, Malformed> {
    let PodObject { metadata, spec, status } = PodObject::deserialize(object)?;
    let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
    let mirror = metadata.annotation(CONFIG_MIRROR)?.is_some();
    // A manifest may set any UID of a static pod; a UID of another form does not occur in cgroup paths.
    let config_hash = metadata.annotation(CONFIG_HASH)?.filter(|_| mirror);
    let config_hash = config_hash.and_then(|hash| hash.text().ok()?.parse::<PodUid>().ok());
    let listed = status.pod_ips.into_iter().flatten().filter_map(|it| it.ip);
    let mut addresses = Vec::new();
    for text in listed.chain(status.pod_ip).filter(|text| !text.is_empty()) {
        let ip = address(&text)?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let mut owners = metadata.owner_references.iter().flatten();
    let controller = owners.find(|owner| owner.controller == Some(true));
    Ok(Pod {
        uid: metadata.uid.parse()?,
        controller: controller.map(|owner| owner.kind.as_str().into()),
        resource_version: number(metadata.resource_version.as_deref()),
        role: metadata.annotation(ROLE)?,
        session_name: metadata.annotation(SESSION_NAME)?,
        external_id: metadata.annotation(EXTERNAL_ID)?,
        // It restricts the pod, so that an empty one is a mistake, not the same as none.
        session_policies: metadata.annotation_as_written(SESSION_POLICIES)?,
        namespace: metadata.namespace,
        name: metadata.name,
        node: spec.node_name.filter(|name| !name.is_empty()),
        host_ip: status.host_ip.filter(|ip| !ip.is_empty()).map(|ip| address(&ip)).transpose()?,
        addresses,
        host_network: spec.host_network.unwrap_or_default(),
        service_account: spec
            .service_account_name
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| DEFAULT_SERVICE_ACCOUNT.to_owned()),
        terminating: metadata.deletion_timestamp.is_some(),
        live: !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
        config_hash,
    })
}

/// Parses a namespace, or its metadata alone.
pub(super) fn namespace(object: &Value) -> Result<Namespace, Malformed> {
    let MetadataObject { metadata } = MetadataObject::deserialize(object)?;
    Ok(Namespace {
        resource_version: number(metadata.resource_version.as_deref()),
        permitted: metadata.annotation_as_written(PERMITTED)?,
        allowed_roles: metadata.annotation_as_written(ALLOWED_ROLES)?,
        imdsv2: metadata.annotation_as_written(IMDSV2)?,
        name: metadata.name,
    })
}

/// Parses a ServiceAccount, or its metadata alone.
pub(super) fn service_account(object: &Value) -> Result<ServiceAccount, Malformed> {
    let MetadataObject { metadata } = MetadataObject::deserialize(object)?;
    Ok(ServiceAccount {
        resource_version: number(metadata.resource_version.as_deref()),
        role: metadata.annotation(ROLE_ARN)?,
        name: AccountName::new(&metadata.namespace, &metadata.name),
    })
}

/// The resource version of an object, if it has one.
pub(super) fn version(object: &Value) -> Option<&str> {
    object.get("metadata")?.get("resourceVersion")?.as_str()
}

/// A resource version as a number, which it is for Kubernetes' own types.
pub(super) fn number(version: Option<&str>) -> Option<u64> {
    version?.parse().ok()
}

fn address(text: &str) -> Result<IpAddr, Malformed> {
    text.parse().map_err(|_| Malformed::Address(text.to_owned()))
}

// === impl Metadata ===

impl Metadata {
    /// The annotation, unless it is absent or blank.
    fn annotation(&self, read: AnnotationSpec) -> Result<Option<Annotation>, Malformed> {
        let blank = |it: &Annotation| it.text().is_ok_and(|text| text.trim().is_empty());
        Ok(self.annotation_as_written(read)?.filter(|it| !blank(it)))
    }

    fn annotation_as_written(&self, read: AnnotationSpec) -> Result<Option<Annotation>, Malformed> {
        let AnnotationSpec { name, most } = read;
        let too_long = |length| Annotation::TooLong(TooLong { length, most });
        match self.annotations.as_ref().and_then(|all| all.get(name)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.len() > most => Ok(Some(too_long(text.len()))),
            Some(Value::String(text)) => Ok(Some(Annotation::from(text.as_str()))),
            // The sieve's replacement of a long text; it empties all other objects.
            Some(value) => match value.get("tooLong").and_then(Value::as_u64) {
                Some(length) => Ok(Some(too_long(usize::try_from(length).unwrap_or(usize::MAX)))),
                None => Err(Malformed::Annotation(name)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cluster::sieve::Sieve;
    use crate::cluster::{
        filters::{ACCOUNT_OBJECT, NAMESPACE_OBJECT, ObjectFilters, POD},
        sieve::Filter,
    };

    const UID: &str = "3c1f7b0e-8a55-4f0d-9d3a-5be2c64a7f10";
    const HASH: &str = "6d1f2a3b4c5d6e7f8091a2b3c4d5e6f7";

    fn running() -> Value {
        json!({
            "kind": "Pod", "apiVersion": "v1", "unheard-of": [{}],
            "metadata": {
                "name": "reader", "namespace": "team", "uid": UID, "resourceVersion": "41",
                "labels": {"app": "reader"},
                "ownerReferences": [
                    {"kind": "Other", "name": "o"}, {"kind": "ReplicaSet", "name": "r", "controller": true},
                ],
                "deletionTimestamp": "2026-01-01T00:00:00Z",
                "annotations": {
                    "iam.amazonaws.com/role": "reader", "iam.amazonaws.com/session-name": "s",
                    "iam.amazonaws.com/external-id": "", "other": "x",
                    "iam.amazonaws.com/session-policies": "arn:1,arn:2",
                },
            },
            "spec": {"nodeName": "node-1", "serviceAccountName": "reading", "containers": [{"name": "main"}]},
            "status": {
                "phase": "Running", "hostIP": "192.0.2.1", "podIP": "10.0.0.1",
                "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            },
        })
    }

    /// `running` with the value at each pointer replaced.
    fn with(changes: &[(&str, Value)]) -> Value {
        let mut object = running();
        for (pointer, value) in changes {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            object.pointer_mut(parent).unwrap()[key.replace("~1", "/")] = value.clone();
        }
        object
    }

    #[test]
    fn a_pod_is_reduced_to_what_decides_and_lives_until_it_is_gone() {
        let expected = Pod {
            uid: UID.parse().unwrap(),
            namespace: "team".to_owned(),
            name: "reader".to_owned(),
            resource_version: Some(41),
            node: Some("node-1".to_owned()),
            host_ip: Some("192.0.2.1".parse().unwrap()),
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            host_network: false,
            service_account: "reading".to_owned(),
            live: true,
            terminating: true,
            config_hash: None,
            controller: Some("ReplicaSet".into()),
            role: Some("reader".into()),
            session_name: Some("s".into()),
            external_id: None,
            session_policies: Some("arn:1,arn:2".into()),
        };
        assert_eq!(pod(&running()).unwrap(), expected);
    }

    #[test]
    fn what_is_null_or_absent_is_not_there_yet() {
        let pending = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": UID, "annotations": null},
            "spec": null, "status": {"phase": "Pending", "podIP": "", "podIPs": null},
        });
        let pod = pod(&pending).unwrap();
        assert!(pod.live && !pod.terminating);
        assert!(pod.addresses.is_empty() && pod.role.is_none() && pod.node.is_none());
        assert_eq!(pod.service_account, "default");
        let page =
            page(br#"{"metadata":{"resourceVersion":"7","continue":""},"items":null}"#).unwrap();
        assert_eq!((page.version.as_str(), page.next), ("7", None));
    }

    #[test]
    fn what_has_no_items_is_no_list() {
        const LIST: Filter = <crate::cluster::kinds::Pods<'_> as ObjectFilters>::LIST;
        for (items, is_list) in [
            (r#","items":[]"#, true),
            (r#","items":null"#, true),
            ("", false),
            (r#","items":"none""#, false),
            (r#","items":{}"#, false),
            (r#","items":7"#, false),
        ] {
            let document = format!(r#"{{"metadata":{{"resourceVersion":"7"}}{items}}}"#);
            // As it comes from the wire.
            let mut sieve = Sieve::new(&LIST);
            sieve.feed(document.as_bytes(), |_| {});
            let reduced = sieve.finish().unwrap().unwrap();
            assert_eq!(page(&reduced).is_ok(), is_list, "{document}");
        }
    }

    #[test]
    fn an_annotation_that_narrows_is_kept_when_it_is_blank() {
        for blank in ["", " "] {
            let policies = "/metadata/annotations/iam.amazonaws.com~1session-policies";
            let name = "/metadata/annotations/iam.amazonaws.com~1session-name";
            let pod = pod(&with(&[(policies, json!(blank)), (name, json!(blank))])).unwrap();
            assert_eq!((pod.session_policies, pod.session_name), (Some(blank.into()), None));
        }
        let none =
            with(&[("/metadata/annotations/iam.amazonaws.com~1session-policies", json!(null))]);
        assert_eq!(pod(&none).unwrap().session_policies, None);
    }

    #[test]
    fn phases_and_mirrors_are_told_apart() {
        for (phase, live) in
            [("Pending", true), ("Unknown", true), ("Succeeded", false), ("Failed", false)]
        {
            assert_eq!(
                pod(&with(&[("/status/phase", json!(phase))])).unwrap().live,
                live,
                "{phase}"
            );
        }
        let hash = ("/metadata/annotations/kubernetes.io~1config.hash", json!(HASH));
        let mirror = ("/metadata/annotations/kubernetes.io~1config.mirror", json!(HASH));
        let odd = ("/metadata/annotations/kubernetes.io~1config.hash", json!("odd"));
        let hash_of = |changes: &[_]| pod(&with(changes)).unwrap().config_hash;
        assert_eq!(hash_of(std::slice::from_ref(&hash)), None, "static, but no mirror");
        assert_eq!(hash_of(&[hash, mirror.clone()]), Some(HASH.parse().unwrap()));
        assert_eq!(hash_of(&[odd, mirror]), None);
    }

    #[test]
    fn an_object_that_makes_no_sense_is_refused_whole() {
        for (pointer, value, expected) in [
            ("/metadata/uid", json!("abc"), "\"abc\" is not a pod UID"),
            ("/metadata/uid", json!(null), "expected a string"),
            ("/metadata/name", json!(5), "expected a string"),
            ("/metadata/annotations", json!("x"), "expected a map"),
            ("/metadata/annotations/iam.amazonaws.com~1role", json!(5), "/role is not a string"),
            ("/metadata/annotations/iam.amazonaws.com~1external-id", json!({}), "is not a string"),
            ("/status/podIP", json!("10.0.0"), "\"10.0.0\" is not an IP address"),
            ("/status/podIPs", json!([{"ip": "x"}]), "\"x\" is not an IP address"),
            ("/spec/hostNetwork", json!("yes"), "expected a boolean"),
            ("/spec/serviceAccountName", json!(7), "expected a string"),
        ] {
            let refused = pod(&with(&[(pointer, value)])).unwrap_err().to_string();
            assert!(refused.contains(expected), "{pointer}: {refused}");
        }
        for object in [json!(null), json!([]), json!({}), json!({"metadata": {}}), json!("x")] {
            assert!(pod(&object).is_err() && namespace(&object).is_err(), "{object}");
        }
    }

    #[test]
    fn what_a_namespace_permits_is_kept_as_written() {
        let object = |permitted: Value| {
            json!({"metadata": {
                "name": "team", "resourceVersion": "9",
                "annotations": {
                    "iam.amazonaws.com/permitted": permitted, "iam.amazonaws.com/allowed-roles": permitted,
                },
            }})
        };
        let permitted = |text| {
            let namespace = namespace(&object(text)).unwrap();
            assert_eq!(namespace.permitted, namespace.allowed_roles);
            namespace.permitted
        };
        assert_eq!(permitted(json!("reader.*")), Some("reader.*".into()));
        assert_eq!(permitted(json!("")), Some("".into()));
        assert_eq!(permitted(json!(null)), None);
        assert!(namespace(&object(json!(true))).is_err());
    }

    #[test]
    fn a_service_account_is_its_name_and_role() {
        let object = |role: Value| {
            json!({"metadata": {
                "name": "orders", "namespace": "shop", "resourceVersion": "9",
                "annotations": {"eks.amazonaws.com/role-arn": role},
            }})
        };
        let account = service_account(&object(json!("arn:aws:iam::1:role/r"))).unwrap();
        assert_eq!(account.name.to_string(), "shop/orders");
        assert_eq!(account.role, Some("arn:aws:iam::1:role/r".into()));
        assert_eq!(service_account(&object(json!(""))).unwrap().role, None);
        assert!(service_account(&object(json!(1))).is_err());
    }

    #[test]
    fn a_namespace_requires_tokens_unless_it_says_otherwise() {
        for (written, required) in [
            (json!(null), false),
            (json!(""), false),
            (json!("optional"), false),
            (json!("required"), true),
            (json!(" required "), true),
            (json!("requried"), true),
        ] {
            let annotations = json!({"iam.amazonaws.com/imdsv2": written});
            let object = json!({"metadata": {"name": "team", "annotations": annotations}});
            assert_eq!(namespace(&object).unwrap().requires_imdsv2(), required, "{object}");
        }
    }

    /// An object as it is read: reduced first.
    fn reduced(object: &Value, keep: &'static Filter) -> Value {
        let mut sieve = Sieve::new(keep);
        sieve.feed(object.to_string().as_bytes(), |_| {});
        serde_json::from_slice(&sieve.finish().unwrap().unwrap()).unwrap()
    }

    #[test]
    fn nothing_that_is_read_is_lost_when_it_is_reduced() {
        for object in [
            running(),
            with(&[("/metadata/annotations", json!("x"))]),
            with(&[("/metadata/annotations", json!(null)), ("/status", json!(null))]),
            with(&[("/spec/hostNetwork", json!(true)), ("/status/podIPs", json!([{"ip": 5}]))]),
            with(&[
                ("/metadata/annotations/kubernetes.io~1config.hash", json!(HASH)),
                ("/metadata/annotations/kubernetes.io~1config.mirror", json!(HASH)),
            ]),
        ] {
            static KEEP: Filter = POD;
            let (whole, less) = (pod(&object), pod(&reduced(&object, &KEEP)));
            assert_eq!(whole.ok(), less.ok(), "{object}");
        }
        static NAMESPACE: Filter = NAMESPACE_OBJECT;
        static ACCOUNT: Filter = ACCOUNT_OBJECT;
        let annotations = json!({
            "iam.amazonaws.com/permitted": ".*", "iam.amazonaws.com/allowed-roles": "[\"<a>\"]",
            "iam.amazonaws.com/imdsv2": "required", "eks.amazonaws.com/role-arn": "arn", "other": "x",
        });
        let metadata = json!({"name": "a", "namespace": "b", "resourceVersion": "9", "annotations": annotations});
        let object = json!({"metadata": metadata, "status": {"phase": "Active"}});
        assert_eq!(namespace(&object).unwrap(), namespace(&reduced(&object, &NAMESPACE)).unwrap());
        assert_eq!(
            service_account(&object).unwrap(),
            service_account(&reduced(&object, &ACCOUNT)).unwrap()
        );
    }

    #[test]
    fn an_annotation_that_is_too_long_is_known_by_its_length_alone() {
        static KEEP: Filter = POD;
        let role = "/metadata/annotations/iam.amazonaws.com~1role";
        let said = |object: &Value| pod(object).unwrap().role.unwrap().text().map(str::to_owned);
        for (length, kept) in [(2048, true), (2049, false), (250_000, false)] {
            for character in ["x", "\"", "\u{1}"] {
                let object = with(&[(role, json!(character.repeat(length)))]);
                let less = reduced(&object, &KEEP);
                assert!(less.to_string().len() < 20_000);
                assert_eq!(said(&less).is_ok(), kept, "{length}");
                assert_eq!(said(&less), said(&object), "{length}");
            }
        }
        // What only looks as if the sieve had said so is no string.
        let object = with(&[(role, json!({"tooLong": 7}))]);
        assert!(pod(&reduced(&object, &KEEP)).is_err());
    }

    #[test]
    fn events_are_told_from_errors_and_from_what_is_neither() {
        let of = |line: Value| event(line.to_string().as_bytes());
        let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 410});
        for line in [json!({"type": "ERROR", "object": gone}), gone] {
            let Ok(WatchEvent::Error(status)) = of(line.clone()) else { panic!("{line}") };
            assert_eq!(status.code, 410);
        }
        for line in [json!({"odd": 1}), json!({"type": "ADDED"}), json!([]), json!(7)] {
            assert!(of(line.clone()).is_err(), "{line}");
        }
    }
}

//! What is made by requests: tokens of ServiceAccounts, and Events, checked as a real server checks them.

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::{
    api::{Refusal, bad_request},
    resource::Resource,
    store::{State, Store, event_key, node_key},
};
use crate::fake::web_token;

/// The parts of an Event that can't be changed, as `ValidateEventUpdate` has it.
const FIXED: [&str; 9] = [
    "action",
    "eventTime",
    "note",
    "reason",
    "regarding",
    "related",
    "reportingController",
    "reportingInstance",
    "type",
];

/// TokenRequest: <https://kubernetes.io/docs/reference/kubernetes-api/authentication-resources/token-request-v1/>.
pub(super) fn token(
    state: &State,
    namespace: &str,
    name: &str,
    request: &Value,
) -> Result<Value, Refusal> {
    let account = state.find(Resource::ServiceAccounts, Some(namespace), name)?;
    let spec = &request["spec"];
    let seconds = spec["expirationSeconds"].as_i64().unwrap_or(3600);
    if seconds < 600 {
        return Err(invalid(
            "spec.expirationSeconds: may not specify a duration less than 10 minutes",
        ));
    }
    let audiences = match &spec["audiences"] {
        Value::Array(audiences) if !audiences.is_empty() => json!(audiences),
        _ => json!([web_token::ISSUER]),
    };
    let now = Timestamp::now();
    let expires = now + SignedDuration::from_secs(seconds);
    let mut bound = json!({
        "namespace": namespace,
        "serviceaccount": { "name": name, "uid": account["metadata"]["uid"] },
    });
    if let Some(pod) = bound_pod(state, namespace, name, &spec["boundObjectRef"])? {
        bound["pod"] = json!({ "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"] });
        bound["node"] = json!({ "name": pod["spec"]["nodeName"] });
    }
    let claims = json!({
        "iss": web_token::ISSUER, "aud": audiences,
        "sub": format!("system:serviceaccount:{namespace}:{name}"),
        "iat": now.as_second(), "nbf": now.as_second(), "exp": expires.as_second(),
        "kubernetes.io": bound,
    });
    let mut answer = request.clone();
    answer["kind"] = json!("TokenRequest");
    answer["apiVersion"] = json!("authentication.k8s.io/v1");
    let expires = expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    answer["status"] = json!({ "token": web_token::sign(&claims), "expirationTimestamp": expires });
    Ok(answer)
}

/// The pod that `reference` names, if it names any: it must be there, with that UID and this ServiceAccount.
fn bound_pod<'a>(
    state: &'a State,
    namespace: &str,
    account: &str,
    reference: &Value,
) -> Result<Option<&'a Value>, Refusal> {
    if reference.is_null() {
        return Ok(None);
    }
    if (&reference["kind"], &reference["apiVersion"]) != (&json!("Pod"), &json!("v1")) {
        return Err(bad_request(format!("cannot bind token for object of type {reference}")));
    }
    let name = reference["name"].as_str().unwrap_or_default();
    let pod = state.find(Resource::Pods, Some(namespace), name)?;
    let (asked, real) = (&reference["uid"], &pod["metadata"]["uid"]);
    if !asked.is_null() && asked != real {
        let message = format!(
            "the UID in the bound object reference ({asked}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err((StatusCode::CONFLICT, "Conflict", message));
    }
    if pod["spec"]["serviceAccountName"] != account {
        return Err(bad_request(format!(
            "cannot bind token for serviceaccount {account:?} to pod running with different serviceaccount name."
        )));
    }
    Ok(Some(pod))
}

/// SelfSubjectAccessReview:
/// <https://kubernetes.io/docs/reference/kubernetes-api/authorization-resources/self-subject-access-review-v1/>.
pub(super) fn review(state: &State, review: &Value) -> Value {
    let attributes = &review["spec"]["resourceAttributes"];
    let text = |name: &str| attributes[name].as_str().unwrap_or_default();
    let resource = match text("subresource") {
        "" => text("resource").to_owned(),
        part => format!("{}/{part}", text("resource")),
    };
    let denied = state.denied.contains(&(text("verb").to_owned(), resource));
    let mut answer = review.clone();
    answer["status"] = json!({ "allowed": !denied });
    answer
}

/// Eviction: <https://kubernetes.io/docs/reference/kubernetes-api/policy-resources/eviction-v1/>. The pod is gone at
/// once, or marked as terminating where it has a finalizer.
pub(super) fn evict(
    store: &Store,
    namespace: &str,
    name: &str,
    eviction: &Value,
) -> Result<Value, Refusal> {
    let of = [&eviction["apiVersion"], &eviction["kind"], &eviction["metadata"]["name"]];
    if of != [&json!("policy/v1"), &json!("Eviction"), &json!(name)] {
        return Err(bad_request(format!("no Eviction of policy/v1 of pod {name:?}: {eviction}")));
    }
    let pod = store.state().find(Resource::Pods, Some(namespace), name)?.clone();
    let (asked, real) =
        (&eviction["deleteOptions"]["preconditions"]["uid"], &pod["metadata"]["uid"]);
    if !asked.is_null() && asked != real {
        let message = format!(
            "Operation cannot be fulfilled on pods {name:?}: Precondition failed: UID in precondition: {asked}, UID in object meta: {real}"
        );
        return Err((StatusCode::CONFLICT, "Conflict", message));
    }
    match pod["metadata"]["finalizers"].is_array() {
        true => store.terminate_pod(namespace, name, pod),
        false => store.delete_pod(namespace, name),
    };
    Ok(json!({ "kind": "Status", "apiVersion": "v1", "status": "Success", "code": 201 }))
}

/// Creates an Event of `events.k8s.io/v1`.
pub(super) fn create_event(
    store: &Store,
    namespace: &str,
    event: &Value,
) -> Result<Value, Refusal> {
    check_event(namespace, event)?;
    let mut event = event.clone();
    let metadata = &mut event["metadata"];
    let (name, generate) = (&metadata["name"], &metadata["generateName"]);
    let name = match (name.as_str(), generate.as_str()) {
        (Some(name), _) => name.to_owned(),
        (None, Some(prefix)) => format!("{prefix}{:05}", store.version()),
        (None, None) => return Err(invalid("metadata.name: name or generateName is required")),
    };
    metadata["name"] = json!(name);
    metadata["namespace"] = json!(namespace);
    metadata["uid"] = json!(format!("event-{namespace}-{name}"));
    if store.state().find(Resource::Events, Some(namespace), &name).is_ok() {
        let message = format!("events.events.k8s.io {name:?} already exists");
        return Err((StatusCode::CONFLICT, "AlreadyExists", message));
    }
    Ok(store.write(event_key(namespace, &name), event))
}

/// Merges `patch` into an Event; only its `series` and metadata may change.
pub(super) fn patch_event(
    store: &Store,
    namespace: &str,
    name: &str,
    patch: &Value,
) -> Result<Value, Refusal> {
    let old = store.state().find(Resource::Events, Some(namespace), name)?.clone();
    let mut new = old.clone();
    merge(&mut new, patch);
    if let Some(field) = FIXED.into_iter().find(|field| old[field] != new[field]) {
        return Err(invalid(&format!("{field}: field is immutable")));
    }
    check_event(namespace, &new)?;
    Ok(store.write(event_key(namespace, name), new))
}

/// Merges `patch` into a node, if that is of the version that the patch names.
pub(super) fn patch_node(store: &Store, name: &str, patch: &Value) -> Result<Value, Refusal> {
    let mut node = store.state().find(Resource::Nodes, None, name)?.clone();
    let (asked, real) =
        (&patch["metadata"]["resourceVersion"], &node["metadata"]["resourceVersion"]);
    if !asked.is_null() && asked != real {
        let message = format!(
            "Operation cannot be fulfilled on nodes {name:?}: the object has been modified; please apply your changes to the latest version and try again"
        );
        return Err((StatusCode::CONFLICT, "Conflict", message));
    }
    merge(&mut node, patch);
    Ok(store.write(node_key(name), node))
}

/// As `ValidateEventCreate` has it:
/// <https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/core/validation/events.go>
fn check_event(namespace: &str, event: &Value) -> Result<(), Refusal> {
    let text = |field: &str| event[field].as_str().unwrap_or_default();
    for (field, longest) in
        [("action", 128), ("reason", 128), ("reportingController", 316), ("reportingInstance", 128)]
    {
        if text(field).is_empty() || text(field).len() > longest {
            return Err(invalid(&format!("{field}: required, and at most {longest} characters")));
        }
    }
    if text("eventTime").parse::<Timestamp>().is_err() {
        return Err(invalid("eventTime: Required value"));
    }
    if !matches!(text("type"), "Normal" | "Warning") {
        return Err(invalid("type: Invalid value"));
    }
    if text("note").len() > 1024 {
        return Err(invalid("note: can have at most 1024 characters"));
    }
    let (regarding, own) = (&event["regarding"]["namespace"], &event["metadata"]["namespace"]);
    let fits = match regarding.as_str() {
        None | Some("") => matches!(namespace, "default" | "kube-system"),
        Some(regarding) => regarding == namespace,
    };
    if !fits || own.as_str().is_some_and(|own| own != namespace) {
        return Err(invalid("regarding.namespace: does not match event.namespace"));
    }
    let series = &event["series"];
    if !series.is_null() {
        let count = series["count"].as_i64().unwrap_or_default();
        let last = series["lastObservedTime"].as_str().unwrap_or_default();
        if count < 2 || last.parse::<Timestamp>().is_err() {
            return Err(invalid(
                "series: count must be at least 2, and lastObservedTime is required",
            ));
        }
    }
    Ok(())
}

/// JSON merge patch (RFC 7396); a strategic one is the same where there are no lists.
fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        into.clone_from(patch);
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            into.as_object_mut().map(|into| into.remove(key));
        } else {
            merge(&mut into[key], value);
        }
    }
}

fn invalid(message: &str) -> Refusal {
    (StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message.to_owned())
}

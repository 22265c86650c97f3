//! The HTTP side: which request is what, lists, and single records.

use std::{mem, net::SocketAddr, sync::Arc, time::Duration};

use http::{Method, Response, StatusCode, header::ACCEPT};
use hyper::upgrade::OnUpgrade;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    containers,
    record::status,
    resource::Resource,
    store::{Gone, Seen, Store},
    watch::{View, Watch, event, too_old},
    write,
};
use crate::fake::{
    fault::Call,
    http::{Answer, Body, chunks, full},
};

const JSON: &str = "application/json";
/// Where a caller asks what it may do.
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
/// How much of a list is sent at once.
const CHUNK: usize = 16 * 1024;
/// What real servers take when a watch names no `timeoutSeconds`: 30 to 60 minutes.
const WATCH_TIMEOUT: Duration = Duration::from_secs(1800);

/// An error answer: code, reason and message.
pub(super) type Refusal = (StatusCode, &'static str, String);

#[derive(Debug)]
pub(super) struct Api {
    store: Arc<Store>,
}

/// What a path names.
#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    resource: Resource,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
    /// Such as `token`.
    subresource: Option<&'a str>,
}

// === impl Target ===

impl<'a> Target<'a> {
    fn parse(path: &'a str) -> Option<Self> {
        let path: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, rest) = match path.as_slice() {
            ["api", "v1", rest @ ..] => ("v1", rest),
            ["apis", "events.k8s.io", "v1", rest @ ..] => ("events.k8s.io/v1", rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let mut rest = rest.iter().copied();
        let plural = rest.next()?;
        let resource = Resource::ALL
            .into_iter()
            .find(|resource| resource.plural() == plural && resource.api_version() == group)?;
        let target = Self { resource, namespace, name: rest.next(), subresource: rest.next() };
        // Records of namespaced kinds are named together with their namespace.
        let named = target.name.is_none() || namespace.is_some() == resource.is_namespaced();
        (rest.next().is_none() && named).then_some(target)
    }
}

// === impl Api ===

impl Api {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// A list; with a limit, and not from the cache, one page of it.
    fn list(&self, view: View, seen: &Seen) -> Result<Response<Body>, Refusal> {
        let mut state = self.store.state();
        let field = |name: &str| seen.query.get(name).filter(|text| !text.is_empty());
        let asked = field("resourceVersion").and_then(|version| version.parse().ok());
        let next = field("continue").map(|token| page_token(token)).transpose()?;
        let limit = field("limit").and_then(|limit| limit.parse().ok());
        let limit: usize = limit.filter(|_| asked.is_none()).unwrap_or(usize::MAX);
        let (version, records, after) = match (&state.cached, asked, next) {
            (None, _, Some((version, after))) => {
                let expired = || {
                    let message = "The provided continue parameter is too old".to_owned();
                    (StatusCode::GONE, "Expired", message)
                };
                let records = state.snapshots.get(&version).ok_or_else(expired)?;
                (version, records, after)
            }
            (None, ..) => (state.version, &state.records, 0),
            (Some(cached), Some(asked), _) if asked <= cached.version => {
                (cached.version, &cached.records, 0)
            }
            (Some(cached), Some(asked), _) => return Err(too_large(asked, cached.version)),
            (Some(_), None, _) => return Err(no_etcd()),
        };
        let shown = view.records(records).map(Arc::clone).skip(after);
        let mut page: Vec<_> = shown.take(limit.saturating_add(1)).collect();
        let mut metadata = json!({ "resourceVersion": version.to_string() });
        if page.len() > limit {
            page.truncate(limit);
            metadata["continue"] = json!(format!("{version}/{}", after + limit));
            let records = records.clone();
            state.snapshots.entry(version).or_insert(records);
        }
        drop(state);
        Ok(list_answer(view, &metadata, page))
    }

    fn watch(&self, view: View, seen: &Seen) -> Result<Response<Body>, Refusal> {
        let asked = seen.query.get("resourceVersion").map_or("", String::as_str);
        let mut state = self.store.state();
        let fresh = matches!(asked, "" | "0");
        let Some(cursor) = (if fresh { Some(state.version) } else { asked.parse().ok() }) else {
            return Err(bad_request(format!("invalid resource version {asked:?}")));
        };
        if cursor < state.oldest && state.conduct.gone == Gone::Status {
            return Err((StatusCode::GONE, "Expired", too_old(cursor, &state)));
        }
        let first: Vec<Value> = if fresh {
            view.records(&state.records).map(|record| event("ADDED", &view.show(record))).collect()
        } else {
            Vec::new()
        };
        state.open_watches += 1;
        let watch = Watch {
            store: Arc::clone(&self.store),
            view,
            bookmarks: seen.query.get("allowWatchBookmarks").is_some_and(|value| value == "true"),
            cursor,
            injected: state.injected.len(),
            closings: state.closings,
        };
        drop(state);
        let timeout = seen.query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok());
        let deadline = Instant::now() + timeout.map_or(WATCH_TIMEOUT, Duration::from_secs);
        let (tx, answer) = chunks(JSON);
        tokio::spawn(async move {
            // The client went away, or the watch has ended: both are its end.
            let _ = tokio::time::timeout_at(deadline, watch.run(first, tx)).await;
        });
        Ok(answer)
    }

    /// List, watch or get.
    fn read(&self, target: &Target<'_>, seen: &Seen) -> Result<Response<Body>, Refusal> {
        if seen.query.contains_key("sendInitialEvents") {
            let message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
            return Err((StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message.to_owned()));
        }
        let selector = seen.query.get("fieldSelector").filter(|selector| !selector.is_empty());
        let node = selector.map(|selector| {
            let node = selector.strip_prefix("spec.nodeName=").map(str::to_owned);
            node.ok_or_else(|| {
                bad_request(format!("field selector {selector:?} is not known here"))
            })
        });
        let labels = seen.query.get("labelSelector").filter(|selector| !selector.is_empty());
        let label = labels.map(|selector| {
            let parts = selector.split_once('=').map(|(name, value)| (name.into(), value.into()));
            parts.ok_or_else(|| {
                bad_request(format!("label selector {selector:?} is not known here"))
            })
        });
        let view = View {
            label: label.transpose()?,
            resource: target.resource,
            namespace: target.namespace.map(str::to_owned),
            node: node.transpose()?,
            metadata_only: seen.accept.contains("as=PartialObjectMetadata"),
        };
        if let Some(name) = target.name {
            let state = self.store.state();
            if state.cached.is_some() {
                return Err(no_etcd());
            }
            let record = state.find(target.resource, target.namespace, name)?;
            return Ok(json_answer(StatusCode::OK, &view.show(record)));
        }
        if seen.is_watch() { self.watch(view, seen) } else { self.list(view, seen) }
    }

    fn route(&self, call: &Call) -> Result<Response<Body>, Refusal> {
        let seen = &seen(call);
        if seen.path == "/version" {
            let version = json!({ "major": "1", "minor": "35", "gitVersion": "v1.35.0" });
            return Ok(json_answer(StatusCode::OK, &version));
        }
        if seen.method == Method::POST && seen.path == REVIEWS {
            let review = write::review(&self.store.state(), &seen.body);
            return Ok(json_answer(StatusCode::CREATED, &review));
        }
        let unknown = || (StatusCode::NOT_FOUND, "NotFound", "no such resource".to_owned());
        let target = Target::parse(&seen.path).ok_or_else(unknown)?;
        let Target { resource, namespace, name, subresource } = target;
        let (status, body) = match (&seen.method, resource, namespace, name, subresource) {
            (&Method::GET, _, _, _, None) => return self.read(&target, seen),
            (&Method::GET, Resource::Pods, Some(namespace), Some(name), Some("log")) => {
                return containers::log(&self.store, namespace, name, call);
            }
            (&Method::GET, Resource::Pods, Some(namespace), Some(name), Some("exec")) => {
                return containers::upgrade(&self.store, namespace, name, call);
            }
            (
                &Method::POST,
                Resource::ServiceAccounts,
                Some(namespace),
                Some(name),
                Some("token"),
            ) => {
                let token = write::token(&self.store.state(), namespace, name, &seen.body)?;
                (StatusCode::CREATED, token)
            }
            (&Method::POST, Resource::Pods, Some(namespace), Some(name), Some("eviction")) => {
                (StatusCode::CREATED, write::evict(&self.store, namespace, name, &seen.body)?)
            }
            (&Method::POST, Resource::Events, Some(namespace), None, None) => {
                (StatusCode::CREATED, write::create_event(&self.store, namespace, &seen.body)?)
            }
            (&Method::PATCH, Resource::Events, Some(namespace), Some(name), None) => {
                (StatusCode::OK, write::patch_event(&self.store, namespace, name, &seen.body)?)
            }
            (&Method::PATCH, Resource::Nodes, None, Some(name), None) => {
                (StatusCode::OK, write::patch_node(&self.store, name, &seen.body)?)
            }
            (method, ..) => {
                let message = format!("{method} is not for {}", seen.path);
                return Err((StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message));
            }
        };
        Ok(json_answer(status, &body))
    }
}

impl Answer for Api {
    fn note(&self, _peer: SocketAddr, call: &Call) {
        self.store.note(seen(call));
    }

    fn answer(&self, call: &Call) -> Response<Body> {
        let answered = self.route(call);
        answered.unwrap_or_else(|(code, reason, message)| failure(code, reason, &message))
    }

    fn upgraded(&self, call: &Call, upgrade: OnUpgrade) {
        let (store, call) = (Arc::clone(&self.store), call.clone());
        tokio::spawn(async move {
            let Some(Target { namespace: Some(namespace), name: Some(pod), .. }) =
                Target::parse(&call.path)
            else {
                return;
            };
            // A client that breaks off hears nothing anyway.
            let _ = containers::run(&store, namespace, pod, &call, upgrade).await;
        });
    }

    fn refusal(&self, status: StatusCode, code: &str) -> Response<Body> {
        failure(status, code, "refused by the lab")
    }
}

/// A list of `page`, sent object by object, so that it may be of any length.
fn list_answer(view: View, metadata: &Value, page: Vec<Arc<Value>>) -> Response<Body> {
    let (kind, api_version) = match view.metadata_only {
        true => ("PartialObjectMetadataList".to_owned(), "meta.k8s.io/v1"),
        false => (format!("{}List", view.resource.kind()), view.resource.api_version()),
    };
    let head = format!(
        r#"{{"kind":"{kind}","apiVersion":"{api_version}","metadata":{metadata},"items":["#
    );
    let (tx, answer) = chunks(JSON);
    tokio::spawn(async move {
        let mut text = head;
        for (n, record) in page.iter().enumerate() {
            if n > 0 {
                text.push(',');
            }
            text += &view.show(record).to_string();
            // The client went away.
            if text.len() > CHUNK && tx.send(mem::take(&mut text).into()).await.is_err() {
                return;
            }
        }
        // Nor is it an error then.
        let _ = tx.send((text + "]}").into()).await;
    });
    answer
}

/// Which version a page is of, and how many objects come before it.
fn page_token(token: &str) -> Result<(u64, usize), Refusal> {
    let parts = token.split_once('/');
    let parts = parts.and_then(|(version, at)| Some((version.parse().ok()?, at.parse().ok()?)));
    parts.ok_or_else(|| bad_request(format!("invalid continue {token:?}")))
}

/// What real servers say when etcd does not answer.
fn no_etcd() -> Refusal {
    let message = "etcdserver: request timed out".to_owned();
    (StatusCode::INTERNAL_SERVER_ERROR, "InternalError", message)
}

fn too_large(asked: u64, current: u64) -> Refusal {
    let message = format!("Too large resource version: {asked}, current: {current}");
    (StatusCode::GATEWAY_TIMEOUT, "Timeout", message)
}

pub(super) fn bad_request(message: String) -> Refusal {
    (StatusCode::BAD_REQUEST, "BadRequest", message)
}

fn seen(call: &Call) -> Seen {
    Seen {
        method: call.method.clone(),
        path: call.path.clone(),
        query: call.fields.clone(),
        accept: call.header(ACCEPT).unwrap_or_default().to_owned(),
        body: serde_json::from_slice(&call.body).unwrap_or_default(),
    }
}

fn failure(code: StatusCode, reason: &str, message: &str) -> Response<Body> {
    json_answer(code, &status(code.as_u16(), reason, message))
}

fn json_answer(status: StatusCode, body: &Value) -> Response<Body> {
    full(status, JSON, body.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_kind_a_namespace_a_record_and_a_part_of_it() {
        let target = |resource, namespace, name, subresource| {
            Some(Target { resource, namespace, name, subresource })
        };
        use Resource::{Events, Namespaces, Pods, ServiceAccounts};
        for (path, parsed) in [
            ("/api/v1/pods", target(Pods, None, None, None)),
            ("/api/v1/namespaces", target(Namespaces, None, None, None)),
            ("/api/v1/namespaces/shop", target(Namespaces, None, Some("shop"), None)),
            ("/api/v1/namespaces/shop/pods", target(Pods, Some("shop"), None, None)),
            (
                "/api/v1/namespaces/shop/serviceaccounts/a/token",
                target(ServiceAccounts, Some("shop"), Some("a"), Some("token")),
            ),
            (
                "/apis/events.k8s.io/v1/namespaces/shop/events/e",
                target(Events, Some("shop"), Some("e"), None),
            ),
            ("/api/v1/nodes/n1", target(Resource::Nodes, None, Some("n1"), None)),
            ("/api/v1/events", None),
            ("/api/v1/pods/a", None),
            ("/api/v1/namespaces/shop/pods/a/b/c", None),
            ("/apis/apps/v1/deployments", None),
        ] {
            assert_eq!(Target::parse(path), parsed, "{path}");
        }
    }
}

//! The HTTP side: list and watch as <https://kubernetes.io/docs/reference/using-api/api-concepts/> describes them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::ACCEPT};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::Instant};

use super::{
    record::{metadata_only, status},
    store::{Change, Gone, Resource, Seen, State, Store},
};
use crate::lab::fake::{
    form,
    http::{Answer, Body, chunks, full},
};

const JSON: &str = "application/json";
/// What real servers take when a watch names no `timeoutSeconds`: 30 to 60 minutes.
const WATCH_TIMEOUT: Duration = Duration::from_secs(1800);

#[derive(Debug)]
pub(super) struct Api {
    store: Arc<Store>,
}

/// Which records, and how they are shown.
#[derive(Clone, Debug)]
struct View {
    resource: Resource,
    namespace: Option<String>,
    node: Option<String>,
    metadata_only: bool,
}

/// One open watch. Drop counts it off.
struct Watch {
    store: Arc<Store>,
    view: View,
    bookmarks: bool,
    cursor: u64,
    injected: usize,
    closings: u64,
}

// === impl Api ===

impl Api {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    fn list(&self, view: &View) -> Response<Body> {
        let state = self.store.state();
        let version = state.version.to_string();
        let (kind, api_version) = match (view.metadata_only, view.resource) {
            (true, _) => ("PartialObjectMetadataList", "meta.k8s.io/v1"),
            (false, Resource::Pods) => ("PodList", "v1"),
            (false, Resource::Namespaces) => ("NamespaceList", "v1"),
        };
        let items: Vec<Value> = view.records(&state).map(|record| view.show(record)).collect();
        let metadata = json!({ "resourceVersion": version });
        json_answer(
            StatusCode::OK,
            &json!({ "kind": kind, "apiVersion": api_version, "metadata": metadata, "items": items }),
        )
    }

    fn watch(&self, view: View, seen: &Seen) -> Response<Body> {
        let asked = seen.query.get("resourceVersion").map_or("", String::as_str);
        let mut state = self.store.state();
        let fresh = matches!(asked, "" | "0");
        let Some(cursor) = (if fresh { Some(state.version) } else { asked.parse().ok() }) else {
            let message = format!("invalid resource version {asked:?}");
            return failure(StatusCode::BAD_REQUEST, "BadRequest", &message);
        };
        if cursor < state.oldest && state.conduct.gone == Gone::Status {
            return failure(StatusCode::GONE, "Expired", &too_old(cursor, &state));
        }
        let first: Vec<Value> = if fresh {
            view.records(&state).map(|record| event("ADDED", &view.show(record))).collect()
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
        answer
    }

    fn route(&self, seen: &Seen) -> Response<Body> {
        if let Some(status) = self.store.state().conduct.refusing {
            return failure(status, "InternalError", "refused by the lab");
        }
        let path: Vec<&str> = seen.path.trim_matches('/').split('/').collect();
        let (resource, namespace) = match path.as_slice() {
            ["version"] => {
                let version = json!({ "major": "1", "minor": "35", "gitVersion": "v1.35.0" });
                return json_answer(StatusCode::OK, &version);
            }
            ["api", "v1", "pods"] => (Resource::Pods, None),
            ["api", "v1", "namespaces", namespace, "pods"] => (Resource::Pods, Some(*namespace)),
            ["api", "v1", "namespaces"] => (Resource::Namespaces, None),
            _ => return failure(StatusCode::NOT_FOUND, "NotFound", "no such resource"),
        };
        if seen.query.contains_key("sendInitialEvents") {
            let message = "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
            return failure(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message);
        }
        let node = match seen.query.get("fieldSelector").map(String::as_str) {
            None | Some("") => None,
            Some(selector) => match selector.strip_prefix("spec.nodeName=") {
                Some(node) => Some(node.to_owned()),
                None => {
                    let message = format!("field selector {selector:?} is not known here");
                    return failure(StatusCode::BAD_REQUEST, "BadRequest", &message);
                }
            },
        };
        let metadata_only = seen.accept.contains("as=PartialObjectMetadata");
        let view = View { resource, namespace: namespace.map(str::to_owned), node, metadata_only };
        if seen.is_watch() { self.watch(view, seen) } else { self.list(&view) }
    }
}

impl Answer for Api {
    async fn answer(&self, _peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
        let seen = Seen {
            path: request.uri().path().to_owned(),
            query: form::parse(request.uri().query().unwrap_or_default()),
            accept: accept.unwrap_or_default().to_owned(),
        };
        self.store.note(seen.clone());
        self.route(&seen)
    }
}

// === impl View ===

impl View {
    fn shows(&self, record: &Value) -> bool {
        self.namespace
            .as_deref()
            .is_none_or(|namespace| record["metadata"]["namespace"] == namespace)
            && self.node.as_deref().is_none_or(|node| record["spec"]["nodeName"] == node)
    }

    fn show(&self, record: &Value) -> Value {
        if self.metadata_only { metadata_only(record) } else { record.clone() }
    }

    fn records<'a>(&'a self, state: &'a State) -> impl Iterator<Item = &'a Value> {
        let of_kind = state.records.iter().filter(|(key, _)| key.0 == self.resource);
        of_kind.map(|(_, record)| &**record).filter(|record| self.shows(record))
    }

    /// What a watch with this view hears of a change: a record that leaves the selector is DELETED to it.
    fn event(&self, change: &Change) -> Option<Value> {
        if change.resource != self.resource {
            return None;
        }
        let old = change.old.as_deref().filter(|record| self.shows(record));
        let new = change.new.as_deref().filter(|record| self.shows(record));
        let (kind, record) = match (old, new) {
            (None, None) => return None,
            (None, Some(new)) => ("ADDED", new),
            (Some(_), Some(new)) => ("MODIFIED", new),
            (Some(old), None) => ("DELETED", old),
        };
        let mut shown = self.show(record);
        shown["metadata"]["resourceVersion"] = json!(change.version.to_string());
        Some(event(kind, &shown))
    }

    fn bookmark(&self, version: u64) -> Value {
        let kind = self.resource.kind();
        let metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
        let mut object = json!({ "kind": kind, "apiVersion": "v1", "metadata": metadata });
        if self.metadata_only {
            object = metadata_only(&object);
        } else if self.resource == Resource::Pods {
            object["spec"] = json!({ "containers": null });
            object["status"] = json!({});
        }
        event("BOOKMARK", &object)
    }
}

// === impl Watch ===

impl Watch {
    async fn run(mut self, mut lines: Vec<Value>, tx: mpsc::Sender<Bytes>) {
        let mut changes = self.store.changes();
        let mut quiet_since = Instant::now();
        loop {
            changes.mark_unchanged();
            let (stalled, period) = {
                let state = self.store.state();
                (state.conduct.stalled, state.conduct.bookmarks)
            };
            if !stalled {
                let ended = self.catch_up(&mut lines);
                if self.bookmarks && lines.is_empty() && quiet_since.elapsed() >= period {
                    lines.push(self.view.bookmark(self.cursor));
                }
                if !lines.is_empty() {
                    quiet_since = Instant::now();
                }
                for line in lines.drain(..) {
                    // An injected line is a string here, and is sent as it is.
                    let text = line.as_str().map_or_else(|| line.to_string(), str::to_owned);
                    if tx.send(Bytes::from(text + "\n")).await.is_err() {
                        return;
                    }
                }
                if ended {
                    return;
                }
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(quiet_since + period), if self.bookmarks && !stalled => {}
                () = tx.closed() => return,
            }
        }
    }

    /// Adds what happened since the last time to `lines`; `true` when the watch ends with it.
    fn catch_up(&mut self, lines: &mut Vec<Value>) -> bool {
        let state = self.store.state();
        let injected = state.injected.iter().skip(self.injected);
        lines.extend(injected.map(|line| Value::from(line.as_str())));
        self.injected = state.injected.len();
        if self.cursor < state.oldest {
            lines.push(event("ERROR", &status(410, "Expired", &too_old(self.cursor, &state))));
            return true;
        }
        let news = state.history.iter().filter(|change| change.version > self.cursor);
        lines.extend(news.filter_map(|change| self.view.event(change)));
        self.cursor = state.version.max(self.cursor);
        state.closings > self.closings
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.store.state().open_watches -= 1;
    }
}

fn event(kind: &str, object: &Value) -> Value {
    json!({ "type": kind, "object": object })
}

fn too_old(asked: u64, state: &State) -> String {
    format!("too old resource version: {asked} ({})", state.oldest)
}

fn failure(code: StatusCode, reason: &str, message: &str) -> Response<Body> {
    json_answer(code, &status(code.as_u16(), reason, message))
}

fn json_answer(status: StatusCode, body: &Value) -> Response<Body> {
    full(status, JSON, body.to_string())
}

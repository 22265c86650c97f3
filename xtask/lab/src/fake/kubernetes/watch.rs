//! What lists and watches show, and the open watches, as
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/> describes them.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::Instant};

use super::{
    record::{metadata_only, status},
    resource::Resource,
    store::{Change, Key, State, Store},
};

/// Which records, and how they are shown.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) resource: Resource,
    pub(super) namespace: Option<String>,
    pub(super) node: Option<String>,
    /// A label and its value.
    pub(super) label: Option<(String, String)>,
    pub(super) metadata_only: bool,
}

/// One open watch. Drop counts it off.
pub(super) struct Watch {
    pub(super) store: Arc<Store>,
    pub(super) view: View,
    pub(super) bookmarks: bool,
    pub(super) cursor: u64,
    pub(super) injected: usize,
    pub(super) closings: u64,
}

// === impl View ===

impl View {
    fn shows(&self, record: &Value) -> bool {
        self.namespace
            .as_deref()
            .is_none_or(|namespace| record["metadata"]["namespace"] == namespace)
            && self.label.as_ref().is_none_or(|(name, value)| {
                record["metadata"]["labels"][name].as_str() == Some(value)
            })
            && self.node.as_deref().is_none_or(|node| record["spec"]["nodeName"] == node)
    }

    pub(super) fn show(&self, record: &Value) -> Value {
        if self.metadata_only { metadata_only(record) } else { record.clone() }
    }

    pub(super) fn records<'a>(
        &'a self,
        records: &'a BTreeMap<Key, Arc<Value>>,
    ) -> impl Iterator<Item = &'a Arc<Value>> {
        let of_kind = records.iter().filter(|(key, _)| key.0 == self.resource);
        of_kind.map(|(_, record)| record).filter(|record| self.shows(record))
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
        let mut object = json!({ "kind": kind, "apiVersion": self.resource.api_version(), "metadata": metadata });
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
    pub(super) async fn run(mut self, mut lines: Vec<Value>, tx: mpsc::Sender<Bytes>) {
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
        let newest = state.cached.as_ref().map_or(state.version, |cached| cached.version);
        let news =
            state.history.iter().filter(|it| it.version > self.cursor && it.version <= newest);
        lines.extend(news.filter_map(|change| self.view.event(change)));
        self.cursor = newest.max(self.cursor);
        state.closings > self.closings
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.store.state().open_watches -= 1;
    }
}

pub(super) fn event(kind: &str, object: &Value) -> Value {
    json!({ "type": kind, "object": object })
}

pub(super) fn too_old(asked: u64, state: &State) -> String {
    format!("too old resource version: {asked} ({})", state.oldest)
}

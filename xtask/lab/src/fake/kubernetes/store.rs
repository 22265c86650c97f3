//! The records, their history and the log of requests: what tests steer and ask.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{
    Conduct,
    api::Refusal,
    containers::{Container, ExecProtocol},
    record::{NamespaceRecord, PodRecord, ServiceAccountRecord, node},
    resource::Resource,
};

/// How "resource version too old" is said; real servers do both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// HTTP 410 in place of the watch.
    Status,
    /// HTTP 200 and an ERROR event that ends the watch.
    Event,
}

/// One request, as it came.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub accept: String,
    /// The body; null when there was none, or no JSON.
    pub body: Value,
}

/// Records with a history, as etcd behind an API server.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
pub(super) struct State {
    /// The newest resource version.
    pub(super) version: u64,
    /// The oldest resource version that a watch can go on from.
    pub(super) oldest: u64,
    /// By resource, namespace (empty for namespaces) and name.
    pub(super) records: BTreeMap<Key, Arc<Value>>,
    pub(super) history: VecDeque<Change>,
    /// What the API server goes on to show while it can't reach etcd.
    pub(super) cached: Option<Cached>,
    /// What lists that go on page by page show, by version.
    pub(super) snapshots: BTreeMap<u64, BTreeMap<Key, Arc<Value>>>,
    pub(super) conduct: Conduct,
    /// Lines put into every open watch, in order.
    pub(super) injected: Vec<String>,
    /// Watches opened before the latest of these end.
    pub(super) closings: u64,
    pub(super) open_watches: usize,
    /// What the caller may not do, as a verb and a resource.
    pub(super) denied: BTreeSet<(String, String)>,
    /// By the namespace and the name of the pod.
    pub(super) containers: BTreeMap<(String, String), Container>,
    pub(super) exec_protocol: ExecProtocol,
    seen: Vec<Seen>,
}

pub(super) type Key = (Resource, String, String);

/// What the API server's cache had when etcd went.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) version: u64,
    pub(super) records: BTreeMap<Key, Arc<Value>>,
}

/// A record before and after.
#[derive(Clone, Debug)]
pub(super) struct Change {
    pub(super) version: u64,
    pub(super) resource: Resource,
    pub(super) old: Option<Arc<Value>>,
    pub(super) new: Option<Arc<Value>>,
}

// === impl Seen ===

impl Seen {
    /// Whether it is a watch.
    #[must_use]
    pub fn is_watch(&self) -> bool {
        self.query.get("watch").is_some_and(|value| value == "true" || value == "1")
    }

    /// Whether it is about all records of `resource`.
    #[must_use]
    pub fn is_about(&self, resource: Resource) -> bool {
        let root = match resource {
            Resource::Events => "/apis",
            _ => "/api",
        };
        self.path == format!("{root}/{}/{}", resource.api_version(), resource.plural())
    }
}

// === impl Store ===

impl Default for Store {
    fn default() -> Self {
        let state = State {
            version: 1000,
            oldest: 1000,
            records: BTreeMap::new(),
            history: VecDeque::new(),
            cached: None,
            snapshots: BTreeMap::new(),
            conduct: Conduct::default(),
            injected: Vec::new(),
            closings: 0,
            open_watches: 0,
            denied: BTreeSet::new(),
            containers: BTreeMap::new(),
            exec_protocol: ExecProtocol::default(),
            seen: Vec::new(),
        };
        Self { state: Mutex::new(state), changed: watch::Sender::new(()) }
    }
}

impl Store {
    /// Creates or replaces a pod; returns its resource version.
    pub fn apply_pod(&self, pod: &PodRecord) -> u64 {
        let key = (Resource::Pods, pod.namespace.clone(), pod.name.clone());
        self.put(key, Some(pod.to_json()))
    }

    /// Replaces a pod when the one of this name has the same UID.
    pub fn update_pod(&self, pod: &PodRecord) {
        let key = (Resource::Pods, pod.namespace.clone(), pod.name.clone());
        let mut state = self.state();
        let there = state.records.get(&key).is_some_and(|old| old["metadata"]["uid"] == pod.uid);
        if there {
            state.put(key, Some(pod.to_json()));
            drop(state);
            self.changed.send_replace(());
        }
    }

    /// Creates a namespace, when there is none of its name.
    pub fn ensure_namespace(&self, namespace: &NamespaceRecord) {
        let key = (Resource::Namespaces, String::new(), namespace.name.clone());
        let there = self.state().records.contains_key(&key);
        if !there {
            self.put(key, Some(namespace.to_json()));
        }
    }

    /// Deletes a pod; that there is none is fine.
    pub fn delete_pod(&self, namespace: &str, name: &str) -> u64 {
        self.put((Resource::Pods, namespace.to_owned(), name.to_owned()), None)
    }

    /// Marks a pod as terminating, as a deletion does where something still holds the pod.
    pub(super) fn terminate_pod(&self, namespace: &str, name: &str, mut pod: Value) -> u64 {
        pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        self.put((Resource::Pods, namespace.to_owned(), name.to_owned()), Some(pod))
    }

    /// Creates or replaces a namespace; returns its resource version.
    pub fn apply_namespace(&self, namespace: &NamespaceRecord) -> u64 {
        let key = (Resource::Namespaces, String::new(), namespace.name.clone());
        self.put(key, Some(namespace.to_json()))
    }

    /// Deletes a namespace, though not its pods.
    pub fn delete_namespace(&self, name: &str) -> u64 {
        self.put((Resource::Namespaces, String::new(), name.to_owned()), None)
    }

    /// Creates or replaces a ServiceAccount; returns its resource version.
    pub fn apply_service_account(&self, account: &ServiceAccountRecord) -> u64 {
        self.put(account_key(&account.namespace, &account.name), Some(account.to_json()))
    }

    /// Deletes a ServiceAccount; that there is none is fine.
    pub fn delete_service_account(&self, namespace: &str, name: &str) -> u64 {
        self.put(account_key(namespace, name), None)
    }

    /// Creates or replaces a node with taints, each `{"key": …, "effect": …}`; returns its resource version.
    pub fn apply_node(&self, name: &str, taints: &[Value]) -> u64 {
        self.put(node_key(name), Some(node(name, taints)))
    }

    /// The taints of a node; none of one that is not there.
    #[must_use]
    pub fn taints(&self, node: &str) -> Vec<Value> {
        let state = self.state();
        let node = state.find(Resource::Nodes, None, node).ok();
        node.and_then(|node| node["spec"]["taints"].as_array().cloned()).unwrap_or_default()
    }

    /// Every Event (`events.k8s.io/v1`) that there is, by namespace and name.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        let state = self.state();
        let events = state.records.iter().filter(|(key, _)| key.0 == Resource::Events);
        events.map(|(_, event)| Value::clone(event)).collect()
    }

    /// Forgets the history: a watch can go on only from now, and no list can.
    pub fn compact(&self) {
        self.steer(|state| {
            state.oldest = state.version;
            state.history.clear();
            state.snapshots.clear();
        });
    }

    /// Uses up a resource version, as other resources' changes do.
    pub fn skip_version(&self) {
        self.steer(|state| state.version += 1);
    }

    /// Chooses how a watch from before the history is told so; at first an event.
    pub fn say_gone_as(&self, gone: Gone) {
        self.steer(|state| state.conduct.gone = gone);
    }

    /// Makes open watches and later ones say nothing, or speak again.
    pub fn stall_watches(&self, stalled: bool) {
        self.steer(|state| state.conduct.stalled = stalled);
    }

    /// Cuts the API server off from etcd, or joins them again: meanwhile it shows what it had then, to watches too, with
    /// bookmarks, and fails whatever only etcd can answer. What is written comes to etcd by other servers.
    pub fn cut_from_etcd(&self, cut: bool) {
        self.steer(|state| {
            let (version, records) = (state.version, state.records.clone());
            state.cached = cut.then_some(Cached { version, records });
        });
    }

    /// Says from now on that the caller may not do `verb` to `resource`, such as `pods` or `pods/eviction`. But for `pods/exec`
    /// and `pods/log`, requests are answered all the same.
    pub fn deny(&self, verb: &str, resource: &str) {
        let right = (verb.to_owned(), resource.to_owned());
        self.steer(|state| state.denied.extend([right]));
    }

    /// Ends every open watch, as real servers do every few minutes.
    pub fn close_watches(&self) {
        self.steer(|state| state.closings += 1);
    }

    /// Puts a line into every open watch.
    pub fn inject(&self, line: &str) {
        self.steer(|state| state.injected.push(line.to_owned()));
    }

    /// How often a quiet watch gets a bookmark; at first each second, where real servers take a minute.
    pub fn bookmark_every(&self, period: Duration) {
        self.steer(|state| state.conduct.bookmarks = period);
    }

    /// Every request so far.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        self.state().seen.clone()
    }

    /// How many lists of all of `resource` were asked for; those of one object are left out, and a list by pages is one.
    #[must_use]
    pub fn lists(&self, resource: Resource) -> usize {
        let one = |seen: &Seen| seen.query.get("limit").is_some_and(|limit| limit == "1");
        let begins = |seen: &Seen| !seen.query.contains_key("continue");
        let whole = |seen: &Seen| !seen.is_watch() && !one(seen) && begins(seen);
        self.count(|seen| seen.is_about(resource) && whole(seen))
    }

    /// How many watches of all of `resource` were asked for.
    #[must_use]
    pub fn watches(&self, resource: Resource) -> usize {
        self.count(|seen| seen.is_about(resource) && seen.is_watch())
    }

    /// How many watches are open now.
    #[must_use]
    pub fn open_watches(&self) -> usize {
        self.state().open_watches
    }

    /// The newest resource version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.state().version
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(super) fn note(&self, seen: Seen) {
        self.state().seen.push(seen);
    }

    /// Creates or replaces a record; returns it with its version.
    pub(super) fn write(&self, key: Key, record: Value) -> Value {
        let mut record = record;
        let version = self.put(key, Some(record.clone()));
        record["metadata"]["resourceVersion"] = json!(version.to_string());
        record
    }

    fn count(&self, which: impl Fn(&Seen) -> bool) -> usize {
        self.state().seen.iter().filter(|seen| which(seen)).count()
    }

    fn steer(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.send_replace(());
    }

    fn put(&self, key: Key, record: Option<Value>) -> u64 {
        let version = self.state().put(key, record);
        self.changed.send_replace(());
        version
    }
}

// === impl State ===

impl State {
    /// The record of this name, or 404.
    pub(super) fn find(
        &self,
        resource: Resource,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<&Value, Refusal> {
        let key = (resource, namespace.unwrap_or_default().to_owned(), name.to_owned());
        let missing = || format!("{} {name:?} not found", resource.plural());
        let record = self.records.get(&key);
        record.map(|record| &**record).ok_or_else(|| (StatusCode::NOT_FOUND, "NotFound", missing()))
    }

    fn put(&mut self, key: Key, record: Option<Value>) -> u64 {
        let old = self.records.get(&key).cloned();
        if record.is_none() && old.is_none() {
            return self.version;
        }
        self.version += 1;
        let (version, resource) = (self.version, key.0);
        let new = record.map(|mut record| {
            record["metadata"]["resourceVersion"] = json!(version.to_string());
            Arc::new(record)
        });
        match &new {
            Some(record) => self.records.insert(key, Arc::clone(record)),
            None => self.records.remove(&key),
        };
        self.history.push_back(Change { version, resource, old, new });
        version
    }
}

pub(super) fn event_key(namespace: &str, name: &str) -> Key {
    (Resource::Events, namespace.to_owned(), name.to_owned())
}

pub(super) fn node_key(name: &str) -> Key {
    (Resource::Nodes, String::new(), name.to_owned())
}

fn account_key(namespace: &str, name: &str) -> Key {
    (Resource::ServiceAccounts, namespace.to_owned(), name.to_owned())
}

//! The kinds of objects that are watched, with their paths, readers and indexes.

use std::time::Duration;

use serde_json::Value;

use super::{
    filters::{self, ObjectFilters},
    metrics::Resource,
    sieve::Filter,
    wire::{self, Malformed},
};
use kiam_core::pods::{Namespace, Pod, PodIndex, PodReader, Record, ServiceAccount};

/// One kind of object, and its part of the [`PodIndex`].
pub(super) trait Kind: ObjectFilters {
    /// The record of an object.
    type Record: Record;

    /// The kind's name in metrics and logs.
    const RESOURCE: Resource;
    /// The path of the list.
    const PATH: &'static str;
    /// The part of each object that is needed.
    const SCOPE: ObjectScope;
    /// Whether only current answers of etcd count as heard from, not every answer of an API server. One kind with it is
    /// enough to monitor etcd.
    const PROVEN: bool = false;

    /// The index of the records.
    fn index(&self) -> &PodIndex;
    /// Reads an object; `None` if it does not concern this node.
    fn read(&self, object: &Value) -> Result<Option<Self::Record>, Malformed>;
    /// The selector of the objects that concern this node.
    fn field_selector(&self) -> Option<String> {
        None
    }
    /// The time since the server was last heard from, of kinds with [`Kind::PROVEN`].
    fn silence(&self) -> Option<Duration> {
        None
    }
    /// Returns when an unknown object is requested.
    fn missed(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// The part of each object that is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ObjectScope {
    Whole,
    Metadata,
}

/// The pods of one node, or of all.
#[derive(Debug)]
pub(super) struct Pods<'a> {
    pub(super) index: &'a PodIndex,
    pub(super) reader: &'a PodReader,
    pub(super) node: Option<String>,
}

/// All namespaces.
#[derive(Debug)]
pub(super) struct Namespaces<'a>(pub(super) &'a PodIndex);

/// All ServiceAccounts. Reading only those of the node's pods would delay the pods, and would need polling for changed
/// annotations.
#[derive(Debug)]
pub(super) struct ServiceAccounts<'a>(pub(super) &'a PodIndex);

// === impl Pods ===

impl ObjectFilters for Pods<'_> {
    const OBJECT: Filter = filters::POD;
}

impl Kind for Pods<'_> {
    type Record = Pod;

    const RESOURCE: Resource = Resource::Pods;
    const PATH: &'static str = "/api/v1/pods";
    const SCOPE: ObjectScope = ObjectScope::Whole;
    const PROVEN: bool = true;

    fn index(&self) -> &PodIndex {
        self.index
    }

    fn field_selector(&self) -> Option<String> {
        self.node.as_ref().map(|node| format!("spec.nodeName={node}"))
    }

    fn read(&self, object: &Value) -> Result<Option<Pod>, Malformed> {
        let pod = wire::pod(object)?;
        // If the server ignored the selector, this node would serve other nodes' pods.
        Ok(Some(pod).filter(|pod| self.node.is_none() || pod.node == self.node))
    }

    fn silence(&self) -> Option<Duration> {
        self.reader.pods_silence()
    }

    async fn missed(&self) {
        self.reader.missed().await;
    }
}

// === impl Namespaces ===

impl ObjectFilters for Namespaces<'_> {
    const OBJECT: Filter = filters::NAMESPACE_OBJECT;
}

impl Kind for Namespaces<'_> {
    type Record = Namespace;

    const RESOURCE: Resource = Resource::Namespaces;
    const PATH: &'static str = "/api/v1/namespaces";
    const SCOPE: ObjectScope = ObjectScope::Metadata;

    fn index(&self) -> &PodIndex {
        self.0
    }

    fn read(&self, object: &Value) -> Result<Option<Namespace>, Malformed> {
        wire::namespace(object).map(Some)
    }
}

// === impl ServiceAccounts ===

impl ObjectFilters for ServiceAccounts<'_> {
    const OBJECT: Filter = filters::ACCOUNT_OBJECT;
}

impl Kind for ServiceAccounts<'_> {
    type Record = ServiceAccount;

    const RESOURCE: Resource = Resource::ServiceAccounts;
    const PATH: &'static str = "/api/v1/serviceaccounts";
    const SCOPE: ObjectScope = ObjectScope::Metadata;

    fn index(&self) -> &PodIndex {
        self.0
    }

    fn read(&self, object: &Value) -> Result<Option<ServiceAccount>, Malformed> {
        wire::service_account(object).map(Some)
    }
}

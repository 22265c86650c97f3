//! The kinds of objects that are watched: where they are, how they read, and where they go.

use std::time::Duration;

use serde_json::Value;

use super::{
    metrics::Resource,
    sieve::Filter,
    wire::{self, Malformed},
};
use kiam_core::pods::{Namespace, Pod, PodIndex, PodReader, Record, ServiceAccount};

/// One kind of object, and its part of the [`PodIndex`].
pub(super) trait Kind: wire::ObjectFilters {
    /// What is kept of an object.
    type Record: Record;

    /// How metrics and logs call it.
    const RESOURCE: Resource;
    /// Where the API has it.
    const PATH: &'static str;
    /// How much of each object is needed.
    const SCOPE: ObjectScope;
    /// Whether only what etcd has just said is a sign of life, and not each answer of an API server. That of one kind is
    /// enough to know whether etcd is reached.
    const PROVEN: bool = false;

    /// Where the records go.
    fn index(&self) -> &PodIndex;
    /// Reads an object; `None` if it is of no concern.
    fn read(&self, object: &Value) -> Result<Option<Self::Record>, Malformed>;
    /// Restricts lists and watches to what concerns this node.
    fn field_selector(&self) -> Option<String> {
        None
    }
    /// How long ago the server was last heard from, of kinds that are [`Kind::PROVEN`].
    fn silence(&self) -> Option<Duration> {
        None
    }
    /// Returns when somebody asks for what is not known.
    fn missed(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// How much to ask for of each object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ObjectScope {
    Whole,
    Metadata,
}

/// The pods of one node, or all.
#[derive(Debug)]
pub(super) struct Pods<'a> {
    pub(super) index: &'a PodIndex,
    pub(super) reader: &'a PodReader,
    pub(super) node: Option<String>,
}

/// All namespaces.
#[derive(Debug)]
pub(super) struct Namespaces<'a>(pub(super) &'a PodIndex);

/// All ServiceAccounts. Those of the node's pods alone could be asked for one by one, as pods come; but then a pod
/// would wait for that, and a changed annotation would have to be asked for again and again.
#[derive(Debug)]
pub(super) struct ServiceAccounts<'a>(pub(super) &'a PodIndex);

// === impl Pods ===

impl wire::ObjectFilters for Pods<'_> {
    const OBJECT: Filter = wire::POD;
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
        // The server selects; were it to ignore the selector, another node's pods would be given their
        // roles here.
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

impl wire::ObjectFilters for Namespaces<'_> {
    const OBJECT: Filter = wire::NAMESPACE_OBJECT;
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

impl wire::ObjectFilters for ServiceAccounts<'_> {
    const OBJECT: Filter = wire::ACCOUNT_OBJECT;
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

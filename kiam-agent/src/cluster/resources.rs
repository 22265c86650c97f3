//! The two kinds that are watched, behind one small trait.

use futures::{
    future::BoxFuture,
    stream::{BoxStream, StreamExt as _},
};
use k8s_openapi::api::core::v1;
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{ListParams, WatchParams},
    core::{PartialObjectMeta, WatchEvent},
};

use super::convert;
use crate::pods::{Namespace, Pod, PodIndex, PodUid};

/// A list: the records, and the version it is of.
pub(super) struct Listed<R> {
    pub(super) records: Vec<R>,
    pub(super) version: String,
}

/// What a watch tells.
pub(super) enum Event<R> {
    /// Added or changed; the version it is of.
    Applied(Option<R>, String),
    /// Gone.
    Deleted(Option<R>, String),
    /// Nothing happened up to this version.
    Bookmark(String),
    /// The server's error; 410 means that the version is too old.
    Error(u16, String),
}

pub(super) type Events<R> = BoxStream<'static, Result<Event<R>, kube::Error>>;

/// A kind that is listed and watched.
pub(super) trait Watched: Send + Sync {
    /// Its records.
    type Record: Send;
    /// For logs and metrics.
    const NAME: &'static str;
    /// Everything, from the server's cache ("any version").
    fn list(&self) -> BoxFuture<'_, Result<Listed<Self::Record>, kube::Error>>;
    /// What changes after `version`.
    fn watch<'a>(
        &'a self,
        version: &'a str,
    ) -> BoxFuture<'a, Result<Events<Self::Record>, kube::Error>>;
    /// Tells the index of a list.
    fn reset(index: &PodIndex, records: Vec<Self::Record>, version: Option<u64>);
    /// Tells the index of one change.
    fn apply(index: &PodIndex, record: Self::Record);
    /// Tells the index that one is gone.
    fn delete(index: &PodIndex, record: Self::Record);
}

/// Pods, of one node or all.
pub(super) struct Pods {
    api: Api<v1::Pod>,
    fields: Option<String>,
}

/// Namespaces: their metadata is enough.
pub(super) struct Namespaces(Api<v1::Namespace>);

// === impl Pods ===

impl Pods {
    pub(super) fn new(client: Client, node: Option<&str>) -> Self {
        let fields = node.map(|node| format!("spec.nodeName={node}"));
        Self { api: Api::all(client), fields }
    }
}

impl Watched for Pods {
    type Record = Pod;
    const NAME: &'static str = "pods";

    fn list(&self) -> BoxFuture<'_, Result<Listed<Pod>, kube::Error>> {
        let mut params = ListParams::default().match_any();
        params.field_selector.clone_from(&self.fields);
        Box::pin(async move {
            let list = self.api.list(&params).await?;
            let version = list.metadata.resource_version.unwrap_or_default();
            Ok(Listed {
                records: list.items.into_iter().filter_map(convert::pod).collect(),
                version,
            })
        })
    }

    fn watch<'a>(&'a self, version: &'a str) -> BoxFuture<'a, Result<Events<Pod>, kube::Error>> {
        let mut params = WatchParams::default();
        params.field_selector.clone_from(&self.fields);
        Box::pin(async move {
            let events = self.api.watch(&params, version).await?;
            Ok(events
                .map(|event| {
                    event.map(|event| {
                        map(event, |pod: v1::Pod| {
                            let version = pod.resource_version().unwrap_or_default();
                            (convert::pod(pod), version)
                        })
                    })
                })
                .boxed())
        })
    }

    fn reset(index: &PodIndex, records: Vec<Pod>, version: Option<u64>) {
        index.reset(records, version);
    }

    fn apply(index: &PodIndex, record: Pod) {
        index.apply(record);
    }

    fn delete(index: &PodIndex, record: Pod) {
        index.delete(&PodUid::new(&record.uid.to_string()));
    }
}

// === impl Namespaces ===

impl Namespaces {
    pub(super) fn new(client: Client) -> Self {
        Self(Api::all(client))
    }
}

impl Watched for Namespaces {
    type Record = Namespace;
    const NAME: &'static str = "namespaces";

    fn list(&self) -> BoxFuture<'_, Result<Listed<Namespace>, kube::Error>> {
        Box::pin(async move {
            let list = self.0.list_metadata(&ListParams::default().match_any()).await?;
            let version = list.metadata.resource_version.unwrap_or_default();
            let records = list.items.iter().filter_map(|item| convert::namespace(item.meta()));
            Ok(Listed { records: records.collect(), version })
        })
    }

    fn watch<'a>(
        &'a self,
        version: &'a str,
    ) -> BoxFuture<'a, Result<Events<Namespace>, kube::Error>> {
        Box::pin(async move {
            let events = self.0.watch_metadata(&WatchParams::default(), version).await?;
            Ok(events
                .map(|event| {
                    event.map(|event| {
                        map(event, |item: PartialObjectMeta<v1::Namespace>| {
                            let version = item.resource_version().unwrap_or_default();
                            (convert::namespace(item.meta()), version)
                        })
                    })
                })
                .boxed())
        })
    }

    fn reset(index: &PodIndex, records: Vec<Namespace>, version: Option<u64>) {
        index.reset_namespaces(records, version);
    }

    fn apply(index: &PodIndex, record: Namespace) {
        index.apply_namespace(record);
    }

    fn delete(index: &PodIndex, record: Namespace) {
        index.delete_namespace(&record.name);
    }
}

fn map<K, R>(event: WatchEvent<K>, convert: impl FnOnce(K) -> (Option<R>, String)) -> Event<R> {
    match event {
        WatchEvent::Added(object) | WatchEvent::Modified(object) => {
            let (record, version) = convert(object);
            Event::Applied(record, version)
        }
        WatchEvent::Deleted(object) => {
            let (record, version) = convert(object);
            Event::Deleted(record, version)
        }
        WatchEvent::Bookmark(bookmark) => Event::Bookmark(bookmark.metadata.resource_version),
        WatchEvent::Error(error) => Event::Error(error.code, error.message),
    }
}

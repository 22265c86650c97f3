//! Fetches lists, and reduces them to records while they arrive.

use std::time::Duration;

use futures::AsyncBufRead;
use kube::{api::ListParams, core::Request};
use tokio::time;

use super::{
    body::{Body, IDLE},
    failure::Failure,
    filters::ObjectFilters,
    freshness::{Freshness, one},
    kinds::{Kind, Namespaces, ObjectScope},
    sieve::Filter,
    wire::{self, Page},
};

/// The deadline of a list, from the request to its last byte. Within it, [`IDLE`] bounds each pause.
const LIST_DEADLINE: Duration = Duration::from_secs(300);
/// The deadline of a read of etcd's current version.
const PROOF_DEADLINE: Duration = Duration::from_secs(5);
/// The objects in a page of a list from etcd. Lists from the server's cache have no limit: servers ignore it, or read
/// from etcd because of it.
const PAGE: u32 = 500;

/// A list, reduced to records.
pub(super) struct List<R> {
    pub(super) version: String,
    pub(super) records: Vec<R>,
}

/// A list of the requested `freshness`, whose objects `read` reduces to records. A list whose next page has expired
/// meanwhile fails as a whole.
pub(super) async fn list<K: Kind>(
    client: &kube::Client,
    kind: &K,
    freshness: &Freshness,
    read: impl Fn(&[u8]) -> Option<K::Record>,
) -> Result<List<K::Record>, Failure> {
    let mut records = Vec::new();
    let field_selector = kind.field_selector();
    let mut params = freshness.of(ListParams { field_selector, ..ListParams::default() });
    if *freshness == Freshness::MostRecent {
        params.limit = Some(PAGE);
    }
    let pages = async {
        loop {
            let request = Request::new(K::PATH);
            let request = match K::SCOPE {
                ObjectScope::Whole => request.list(&params),
                ObjectScope::Metadata => request.list_metadata(&params),
            }?;
            let keep = |item: &[u8]| records.extend(read(item));
            let Page { version, next } =
                page(client.request_stream(request), &K::LIST, keep).await?;
            match next {
                None => return Ok(version),
                Some(next) => params.continue_token = Some(next),
            }
        }
    };
    let version = within(LIST_DEADLINE, pages).await?;
    Ok(List { version, records })
}

/// The freshness of etcd's current version.
pub(super) async fn newest(client: &kube::Client) -> Result<Freshness, Failure> {
    let request = Request::new(Namespaces::PATH).list_metadata(&one())?;
    let keep = &<Namespaces<'_> as ObjectFilters>::LIST;
    let page = page(client.request_stream(request), keep, |_| {});
    Ok(Freshness::NotOlderThan(within(PROOF_DEADLINE, page).await?.version))
}

async fn page<R: AsyncBufRead>(
    answer: impl Future<Output = kube::Result<R>>,
    keep: &'static Filter,
    item: impl FnMut(&[u8]),
) -> Result<Page, Failure> {
    let reader = within(IDLE, async { Ok(answer.await?) }).await?;
    Ok(wire::page(&Body::new(reader, keep).document(item).await?)?)
}

/// The result of `answer`, unless the deadline passes.
async fn within<T>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    time::timeout(deadline, answer).await.map_err(|_| Failure::Timeout(deadline))?
}

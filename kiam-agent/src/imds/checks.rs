//! What every request is checked for before it is looked at.

use std::{net::IpAddr, time::Duration};

use http::{HeaderMap, HeaderValue, Method, header::AsHeaderName};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::time::timeout;

use super::{
    Error,
    service::Imdsv2,
    token::{
        TokenAuthority, TokenTtl, X_AWS_EC2_METADATA_TOKEN, X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS,
    },
};
use kiam_core::pods::Client;

/// Set by proxies; a request that went through one is not the pod's own. EC2 refuses the first on `PUT`; which of
/// them a proxy sets is a matter of its age and configuration.
const PROXIES: [&str; 3] = ["x-forwarded-for", "forwarded", "via"];
/// How long the end of a chunked body may take to come.
const BODY_DEADLINE: Duration = Duration::from_secs(1);

/// Whether a request that reads carried a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ImdsVersion {
    V1,
    V2,
}

/// Refuses what a proxy sent.
pub(super) fn direct(headers: &HeaderMap) -> Result<(), Error> {
    let forwarded = PROXIES.iter().any(|name| headers.contains_key(*name));
    if forwarded { Err(Error::ForwardedFor) } else { Ok(()) }
}

/// Refuses a body: any on what reads, more than nothing on `PUT`, where s3fs sends an empty chunked one.
pub(super) async fn no_body(method: &Method, mut body: Incoming) -> Result<(), Error> {
    if body.is_end_stream() {
        return Ok(());
    }
    if *method != Method::PUT || body.size_hint().lower() > 0 {
        return Err(Error::Body);
    }
    let empty = async {
        while let Some(frame) = body.frame().await {
            if frame.ok()?.data_ref().is_some_and(|data| !data.is_empty()) {
                return None;
            }
        }
        Some(())
    };
    timeout(BODY_DEADLINE, empty).await.ok().flatten().ok_or(Error::Body)
}

/// The life that a token is asked for.
pub(super) fn ttl(headers: &HeaderMap) -> Result<TokenTtl, Error> {
    match only(headers, X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS) {
        Ok(Some(value)) => TokenTtl::parse(value.as_bytes()).ok_or(Error::Ttl),
        Ok(None) | Err(DuplicateHeader) => Err(Error::Ttl),
    }
}

/// Checks the token of a request that reads. One that is there must be good, whether it is needed or not.
pub(super) fn token(
    headers: &HeaderMap,
    client: &Client,
    tokens: &TokenAuthority,
    imdsv2: Imdsv2,
) -> Result<ImdsVersion, Error> {
    match (only(headers, X_AWS_EC2_METADATA_TOKEN), imdsv2) {
        (Ok(Some(token)), _) if tokens.verify(client, token.as_bytes()) => Ok(ImdsVersion::V2),
        (Ok(None), Imdsv2::Optional) => Ok(ImdsVersion::V1),
        (Ok(None), Imdsv2::Required) => Err(Error::TokenMissing),
        (Ok(Some(_)) | Err(DuplicateHeader), _) => Err(Error::TokenInvalid),
    }
}

/// The address that a query names (`?ip=10.0.0.5`), for trying the agent without pods.
///
/// # Errors
///
/// [`Error::Path`] when it is no address.
pub(super) fn queried(query: &str) -> Result<Option<IpAddr>, Error> {
    let mut values = query.split('&').filter_map(|pair| pair.strip_prefix("ip="));
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(text), None) => text.parse().map(Some).map_err(|_| Error::Path),
        (Some(_), Some(_)) => Err(Error::Path),
    }
}

struct DuplicateHeader;

fn only(
    headers: &HeaderMap,
    name: impl AsHeaderName,
) -> Result<Option<&HeaderValue>, DuplicateHeader> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        (_, Some(_)) => Err(DuplicateHeader),
    }
}

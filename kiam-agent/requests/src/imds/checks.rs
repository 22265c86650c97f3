//! The checks of a request's headers and body.

use std::{net::IpAddr, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use tokio::time::timeout;

use super::{
    Error,
    service::Imdsv2,
    token::{
        TokenAuthority, TokenTtl, VerifiedToken, X_AWS_EC2_METADATA_TOKEN,
        X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS,
    },
};
use kiam_core::pods::Client;

/// Headers that proxies set, by their age and configuration. A forwarded request is not the pod's own. EC2 rejects the
/// first header on `PUT`.
static PROXIES: [HeaderName; 3] =
    [HeaderName::from_static("x-forwarded-for"), header::FORWARDED, header::VIA];
static TOKEN: HeaderName = HeaderName::from_static(X_AWS_EC2_METADATA_TOKEN);
static TOKEN_TTL: HeaderName = HeaderName::from_static(X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS);
/// The deadline of the end of a chunked body.
const BODY_DEADLINE: Duration = Duration::from_secs(1);

/// The version of IMDS that a request uses: v2 has a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ImdsVersion {
    V1,
    V2,
}

/// Rejects a forwarded request.
pub(super) fn direct(headers: &HeaderMap) -> Result<(), Error> {
    let forwarded = PROXIES.iter().any(|name| headers.contains_key(name));
    if forwarded { Err(Error::ForwardedFor) } else { Ok(()) }
}

/// Rejects a body. On `PUT` an empty chunked body is accepted, which s3fs sends.
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

/// The requested lifetime of a token.
pub(super) fn ttl(headers: &HeaderMap) -> Result<TokenTtl, Error> {
    match only(headers, &TOKEN_TTL) {
        Ok(Some(value)) => TokenTtl::parse(value.as_bytes()).ok_or(Error::Ttl),
        Ok(None) | Err(DuplicateHeader) => Err(Error::Ttl),
    }
}

/// Checks the token of a request. A given token must be valid, even if none is required.
pub(super) fn token(
    headers: &HeaderMap,
    client: &Client,
    (tokens, verified): (&TokenAuthority, &VerifiedToken),
    imdsv2: Imdsv2,
) -> Result<ImdsVersion, Error> {
    match (only(headers, &TOKEN), imdsv2) {
        (Ok(Some(token)), _) if tokens.verify_again(client, token.as_bytes(), verified) => {
            Ok(ImdsVersion::V2)
        }
        (Ok(None), Imdsv2::Optional) => Ok(ImdsVersion::V1),
        (Ok(None), Imdsv2::Required) => Err(Error::TokenMissing),
        (Ok(Some(_)) | Err(DuplicateHeader), _) => Err(Error::TokenInvalid),
    }
}

/// The address in a query (`?ip=10.0.0.5`), for trying the agent without pods.
///
/// # Errors
///
/// [`Error::Path`] if it is not an address.
pub(super) fn queried(query: &str) -> Result<Option<IpAddr>, Error> {
    let mut values = query.split('&').filter_map(|pair| pair.strip_prefix("ip="));
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(text), None) => text.parse().map(Some).map_err(|_| Error::Path),
        (Some(_), Some(_)) => Err(Error::Path),
    }
}

struct DuplicateHeader;

fn only<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Result<Option<&'a HeaderValue>, DuplicateHeader> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        (_, Some(_)) => Err(DuplicateHeader),
    }
}

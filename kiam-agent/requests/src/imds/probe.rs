//! How the real IMDS is configured, for `kiam-agent preflight`.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Response, StatusCode, header};
use tokio::time::{Instant, timeout};

use super::{
    exchange::{connect, exchange, session_token},
    token::{X_AWS_EC2_METADATA_TOKEN, X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS},
    upstream::{DEADLINE, UpstreamError, UpstreamUrl},
};
use kiam_core::secret::Secret;
use kiam_kernel::sys;

/// The life of the session tokens that are asked for, in seconds.
const LIFE: &str = "1";
/// The header that asks for such a token.
const TTL: Option<(&str, &str)> = Some((X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS, LIFE));
/// Answers in a row that must be dropped, each followed by one that is not.
const DROPPED: u32 = 2;
/// How many times longer than the first answer another one may take before it counts as dropped.
const SLOWER: u32 = 10;
/// The path of session tokens.
const TOKEN: &str = "api/token";
/// A path that every instance has.
const INSTANCE_ID: &str = "meta-data/instance-id";

/// How the service answers on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenPolicy {
    /// Requests need a session token (`HttpTokens=required`).
    Required,
    /// Requests with and without a session token are answered (`HttpTokens=optional`).
    Optional,
    /// The service has no session tokens.
    Absent,
}

/// How far the answer with a session token goes (`HttpPutResponseHopLimit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HopLimit {
    /// To the node alone.
    One,
    /// Over one hop at least, so to pods.
    More,
}

/// The service as it is configured.
#[derive(Clone, Debug)]
pub struct ServiceProfile {
    /// Whether session tokens are needed.
    pub tokens: TokenPolicy,
    /// The service's clock, as its header `Date` has it.
    pub date: Option<String>,
    /// How long it took to get a session token.
    took: Duration,
}

/// Asks the service at `url` how it answers.
///
/// # Errors
///
/// [`UpstreamError`].
pub async fn profile(url: &UpstreamUrl) -> Result<ServiceProfile, UpstreamError> {
    let begun = Instant::now();
    let given = ask_token(url).await?;
    let took = begun.elapsed();
    let date = given.headers().get(header::DATE).and_then(|date| date.to_str().ok());
    let date = date.map(str::to_owned);
    let token = match given.status() {
        StatusCode::OK => Some(session_token(given.body())?),
        StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => None,
        status => return Err(UpstreamError::Status(status)),
    };
    let without = read(url, None).await?.status();
    let tokens = match (token, without) {
        (None, StatusCode::OK) => TokenPolicy::Absent,
        (None, status) => return Err(UpstreamError::Status(status)),
        (Some(token), without) => {
            let with = read(url, Some(&token)).await?.status();
            if with != StatusCode::OK {
                return Err(UpstreamError::Status(with));
            }
            policy(without)?
        }
    };
    Ok(ServiceProfile { tokens, date, took })
}

/// What an answer to a request without a session token says, where one with a token is answered.
fn policy(without: StatusCode) -> Result<TokenPolicy, UpstreamError> {
    match without {
        StatusCode::OK => Ok(TokenPolicy::Optional),
        StatusCode::UNAUTHORIZED => Ok(TokenPolicy::Required),
        status => Err(UpstreamError::Status(status)),
    }
}

/// Measures how far the answer with a session token goes, on the node alone: the answer is dropped if it has no hop left.
///
/// # Errors
///
/// [`UpstreamError`], when the service can't be reached, or answers otherwise than before: a service that is slow for a
/// moment says nothing of hops.
pub async fn hop_limit(
    url: &UpstreamUrl,
    profile: &ServiceProfile,
) -> Result<HopLimit, UpstreamError> {
    for _ in 0..DROPPED {
        match ask_over_last_hop(url, profile).await? {
            Some(StatusCode::OK) => return Ok(HopLimit::More),
            Some(status) => return Err(UpstreamError::Status(status)),
            None => match request(url, Method::PUT, TOKEN, TTL).await?.status() {
                StatusCode::OK => {}
                status => return Err(UpstreamError::Status(status)),
            },
        }
    }
    Ok(HopLimit::One)
}

/// The status of an answer that has a hop left; `None` if none came in time.
async fn ask_over_last_hop(
    url: &UpstreamUrl,
    profile: &ServiceProfile,
) -> Result<Option<StatusCode>, UpstreamError> {
    let stream = timeout(DEADLINE, connect(url)).await.unwrap_or(Err(UpstreamError::Deadline))?;
    let failed = |source| UpstreamError::Connect { url: url.clone(), source };
    // Not before the connection is there: its other packets may go as far as they like, or not.
    sys::drop_last_hop(&stream).map_err(failed)?;
    let patience = DEADLINE.max(profile.took * SLOWER);
    let asked = exchange(stream, url, Method::PUT, TOKEN, TTL);
    timeout(patience, asked).await.ok().transpose().map(|answer| answer.map(|it| it.status()))
}

/// The answer to a request for a session token. The first request after a while may need longer than others.
async fn ask_token(url: &UpstreamUrl) -> Result<Response<Bytes>, UpstreamError> {
    match request(url, Method::PUT, TOKEN, TTL).await {
        Err(_) => request(url, Method::PUT, TOKEN, TTL).await,
        answer => answer,
    }
}

async fn read(url: &UpstreamUrl, token: Option<&Secret>) -> Result<Response<Bytes>, UpstreamError> {
    let header = token.map(|token| (X_AWS_EC2_METADATA_TOKEN, token.expose()));
    request(url, Method::GET, INSTANCE_ID, header).await
}

async fn request(
    url: &UpstreamUrl,
    method: Method,
    path: &str,
    header: Option<(&'static str, &str)>,
) -> Result<Response<Bytes>, UpstreamError> {
    let asked = async { exchange(connect(url).await?, url, method, path, header).await };
    timeout(DEADLINE, asked).await.unwrap_or(Err(UpstreamError::Deadline))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_asks_for_a_token_says_that_one_is_required() {
        for (status, wanted) in [
            (200, Some(TokenPolicy::Optional)),
            (401, Some(TokenPolicy::Required)),
            (403, None),
            (404, None),
            (429, None),
            (503, None),
        ] {
            let found = policy(StatusCode::from_u16(status).unwrap()).ok();
            assert_eq!(found, wanted, "{status}");
        }
    }
}

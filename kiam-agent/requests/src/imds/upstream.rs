//! The client of the real IMDS, for the few paths that pods may read or the agent needs itself.
//!
//! Every request is built here, on a connection of its own. No byte, header, body or state of a pod's connection can reach
//! the real service.

mod patience;
mod url;

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Deserialize;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

pub use self::url::{InvalidUpstream, UpstreamUrl};
use super::{
    exchange::{connect, exchange, session_token},
    route::{Lifetime, UpstreamPath},
    token::{MAX_TOKEN_TTL, X_AWS_EC2_METADATA_TOKEN, X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS},
};
use crate::serve::Relay;
use kiam_core::{
    pods::{Pod, PodUid},
    role::{BaseArn, InvalidRole},
    secret::Secret,
};

/// The deadline of an answer, including the wait for a slot: most SDKs give up after a second.
pub(super) const DEADLINE: Duration = Duration::from_secs(1);
/// The most concurrent requests for single pods: EC2 throttles the service per instance, and the node needs it too. Shared
/// answers need one more request for each path.
const SLOTS: usize = 8;
/// The most slots of one pod, so that others find some when the service is slow.
const SHARE: usize = 2;
/// Slots that the pods of one namespace have at once: a tenant has as many pods as it wants.
const NAMESPACE_SHARE: usize = SLOTS / 2;
/// How long an answer that may change is shared. Termination handlers ask every five seconds or so, and a notice comes two
/// minutes ahead.
const MOMENT: Duration = Duration::from_secs(1);
/// The age at which a token is renewed: well before its expiry, for a machine that was suspended meanwhile.
const RENEW_TOKEN: Duration = Duration::from_secs(MAX_TOKEN_TTL as u64 / 2);
/// The time until a service without tokens is tried for one again.
const RETRY_TOKEN: Duration = Duration::from_secs(300);

/// Why the real IMDS gave no answer. All but `NotFound` and `Arn` may pass.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The path does not exist.
    #[error("the instance metadata service has no such path")]
    NotFound,
    /// The service can't be reached.
    #[error("the instance metadata service at {url} can't be reached: {source}")]
    Connect {
        /// The service's URL.
        url: UpstreamUrl,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the service doesn't speak HTTP.
    #[error("the connection to the instance metadata service broke: {0}")]
    Http(#[from] hyper::Error),
    /// The answer did not come in time.
    #[error("the instance metadata service did not answer within {DEADLINE:?}")]
    Deadline,
    /// The status is not 200.
    #[error("the instance metadata service answered {0}")]
    Status(StatusCode),
    /// The body is too long or malformed.
    #[error("the instance metadata service sent an invalid body")]
    Body,
    /// The instance profile's ARN is malformed.
    #[error("the instance profile has no account: {0}")]
    Arn(#[from] InvalidRole),
}

/// The client of the real IMDS. Cheap to clone.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

struct Inner {
    url: UpstreamUrl,
    slots: Semaphore,
    /// The shares of pods and namespaces with requests now, or at the last new request.
    shares: Mutex<HashMap<Sharer, Arc<Semaphore>>>,
    /// The shared answers, only of open paths, so that there are few entries.
    shared: Mutex<HashMap<UpstreamPath, Arc<SharedAnswer>>>,
    session: Mutex<Session>,
}

/// Who has a share of the slots.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Sharer {
    Pod(PodUid),
    Namespace(String),
}

/// One path's last answer, which all pods share.
struct SharedAnswer {
    /// The permit to ask the service; other requests wait for its answer.
    turn: Arc<Semaphore>,
    answer: Mutex<Option<(Instant, Content)>>,
}

/// The content of a path; `None` if it does not exist.
type Content = Option<Bytes>;

/// The version of the service, with its token.
#[derive(Clone)]
enum Session {
    Unknown,
    V2 { token: Secret, renew_at: Instant },
    V1 { until: Instant },
}

/// The relevant part of `iam/info`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ProfileInfo {
    instance_profile_arn: String,
}

// === impl Upstream ===

impl Upstream {
    /// A client of the service at `url`. No request is made yet.
    #[must_use]
    pub fn new(url: UpstreamUrl) -> Self {
        Self(Arc::new(Inner {
            url,
            slots: Semaphore::new(SLOTS),
            shares: Mutex::default(),
            shared: Mutex::default(),
            session: Mutex::new(Session::Unknown),
        }))
    }

    /// The relay for connections that are passed on to the service.
    #[must_use]
    pub fn relay(&self) -> Relay {
        let (host, port) = self.0.url.socket();
        Relay { host: host.to_owned(), port }
    }

    /// The body of `path`, for `pod`. Content that can't change is requested once, and shared content once a second.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`].
    pub async fn get(&self, path: &UpstreamPath, pod: &Pod) -> Result<Bytes, UpstreamError> {
        let asked = async {
            match path.lifetime() {
                Lifetime::Request => self.in_turn(path, pod).await,
                Lifetime::Instance | Lifetime::Moment => self.shared(path).await,
            }
        };
        let body = timeout(DEADLINE, asked).await.unwrap_or(Err(UpstreamError::Deadline))?;
        body.ok_or(UpstreamError::NotFound)
    }

    /// The shared answer of `path`, requested by one of those that need it now.
    async fn shared(&self, path: &UpstreamPath) -> Result<Content, UpstreamError> {
        let kept = lock(&self.0.shared).entry(path.clone()).or_default().clone();
        if let Some(answer) = kept.get(path.lifetime()) {
            return Ok(answer);
        }
        let turn = kept.turn.clone().acquire_owned().await;
        let turn = turn.expect("the semaphore is never closed");
        if let Some(answer) = kept.get(path.lifetime()) {
            return Ok(answer);
        }
        // A task of its own, so that others get the answer even if this client hangs up.
        let (upstream, path) = (self.clone(), path.clone());
        let asked = tokio::spawn(async move {
            let _turn = turn;
            let answer = timeout(DEADLINE, upstream.ask(&path)).await;
            let answer = answer.unwrap_or(Err(UpstreamError::Deadline))?;
            let is_empty = answer.as_ref().is_some_and(Bytes::is_empty);
            if path.lifetime() == Lifetime::Instance && is_empty {
                return Err(UpstreamError::Body);
            }
            *lock(&kept.answer) = Some((Instant::now(), answer.clone()));
            Ok(answer)
        });
        // It fails only at the runtime's end.
        asked.await.unwrap_or(Err(UpstreamError::Deadline))
    }

    async fn in_turn(&self, path: &UpstreamPath, pod: &Pod) -> Result<Content, UpstreamError> {
        let own = self.share(Sharer::Pod(pod.uid.clone()), SHARE);
        let _own = own.acquire().await.expect("the semaphore is never closed");
        let tenants = self.share(Sharer::Namespace(pod.namespace.clone()), NAMESPACE_SHARE);
        let _tenants = tenants.acquire().await.expect("the semaphore is never closed");
        let _slot = self.0.slots.acquire().await.expect("the semaphore is never closed");
        self.ask(path).await
    }

    /// A share of the slots. Forgets the shares of pods and namespaces without requests.
    fn share(&self, sharer: Sharer, slots: usize) -> Arc<Semaphore> {
        let mut shares = lock(&self.0.shares);
        // Under the lock, so that no share is in use that only the map has.
        shares.retain(|_, share| Arc::strong_count(share) > 1);
        shares.entry(sharer).or_insert_with(|| Arc::new(Semaphore::new(slots))).clone()
    }

    async fn ask(&self, path: &UpstreamPath) -> Result<Content, UpstreamError> {
        match self.fetch(path.as_str()).await {
            Ok(body) => Ok(Some(body)),
            Err(UpstreamError::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The node's region.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`].
    pub async fn region(&self) -> Result<String, UpstreamError> {
        let asked = timeout(DEADLINE, self.shared(&UpstreamPath::region())).await;
        let body = asked.unwrap_or(Err(UpstreamError::Deadline))?.ok_or(UpstreamError::NotFound)?;
        let text = std::str::from_utf8(&body).map_err(|_| UpstreamError::Body)?.trim();
        let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if plain && !text.is_empty() { Ok(text.to_owned()) } else { Err(UpstreamError::Body) }
    }

    /// The prefix of the ARNs of roles in the node's own account, from its instance profile.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`]; `NotFound` if the node has no instance profile.
    pub async fn base_arn(&self) -> Result<BaseArn, UpstreamError> {
        let asked = timeout(DEADLINE, self.fetch("meta-data/iam/info")).await;
        let body = asked.unwrap_or(Err(UpstreamError::Deadline))?;
        let profile: ProfileInfo =
            serde_json::from_slice(&body).map_err(|_| UpstreamError::Body)?;
        let account = profile
            .instance_profile_arn
            .split_once(":instance-profile/")
            .map(|(account, _)| account)
            .ok_or(UpstreamError::Body)?;
        Ok(format!("{account}:role/").parse()?)
    }

    async fn fetch(&self, path: &str) -> Result<Bytes, UpstreamError> {
        let token = self.token().await?;
        let mut answer = self.read(path, token.as_ref()).await?;
        if answer.0 == StatusCode::UNAUTHORIZED {
            // The token is no longer valid, or needed now: request a new one, once.
            *lock(&self.0.session) = Session::Unknown;
            let token = self.token().await?;
            answer = self.read(path, token.as_ref()).await?;
        }
        match answer {
            (StatusCode::OK, body) => Ok(body),
            (StatusCode::NOT_FOUND, _) => Err(UpstreamError::NotFound),
            (status, _) => Err(UpstreamError::Status(status)),
        }
    }

    async fn read(
        &self,
        path: &str,
        token: Option<&Secret>,
    ) -> Result<(StatusCode, Bytes), UpstreamError> {
        let header = token.map(|token| (X_AWS_EC2_METADATA_TOKEN, token.expose()));
        self.exchange(Method::GET, path, header).await
    }

    /// A token of the service; `None` if it has no tokens (IMDSv1).
    async fn token(&self) -> Result<Option<Secret>, UpstreamError> {
        let now = Instant::now();
        match lock(&self.0.session).clone() {
            Session::V2 { token, renew_at } if now < renew_at => return Ok(Some(token)),
            Session::V1 { until } if now < until => return Ok(None),
            _ => {}
        }
        let life = MAX_TOKEN_TTL.to_string();
        let header = Some((X_AWS_EC2_METADATA_TOKEN_TTL_SECONDS, life.as_str()));
        let (status, body) = self.exchange(Method::PUT, "api/token", header).await?;
        let (session, token) = match status {
            StatusCode::OK => {
                let token = session_token(&body)?;
                (Session::V2 { token: token.clone(), renew_at: now + RENEW_TOKEN }, Some(token))
            }
            StatusCode::FORBIDDEN | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                (Session::V1 { until: now + RETRY_TOKEN }, None)
            }
            status => return Err(UpstreamError::Status(status)),
        };
        *lock(&self.0.session) = session;
        Ok(token)
    }

    /// Makes one request on a connection of its own.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        header: Option<(&'static str, &str)>,
    ) -> Result<(StatusCode, Bytes), UpstreamError> {
        let url = &self.0.url;
        let (head, body) =
            exchange(connect(url).await?, url, method, path, header).await?.into_parts();
        Ok((head.status, body))
    }
}

// === impl SharedAnswer ===

impl SharedAnswer {
    /// The answer, if it is still valid. A missing path may appear at any time.
    fn get(&self, lifetime: Lifetime) -> Option<Content> {
        let answer = lock(&self.answer);
        let (at, answer) = answer.as_ref()?;
        let lasts = lifetime == Lifetime::Instance && answer.is_some();
        (lasts || at.elapsed() < MOMENT).then(|| answer.clone())
    }
}

impl Default for SharedAnswer {
    fn default() -> Self {
        Self { turn: Arc::new(Semaphore::new(1)), answer: Mutex::default() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

//! Keeps every wanted role's credentials fresh.

mod arrivals;
mod budget;
mod call;
mod call_log;
#[cfg(any(test, feature = "testing"))]
pub mod fixtures;
mod inheritance;
mod metrics;
mod pace;
mod parts;
mod plan;
mod prefetch;
mod queue;
mod refresh;
pub mod schedule;
mod stale;
mod store;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

pub use self::{
    inheritance::{Inheritance, InheritanceError},
    metrics::Metrics,
    pace::Pace,
    parts::PrefetcherParts,
    prefetch::Prefetcher,
    refresh::{RefreshError, Refresher},
    store::{CredentialReader, Overdue, Summary},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use prometheus_client::encoding::EncodeLabelValue;
use tokio::time::Instant;

use crate::{
    rate::Rate,
    role::{AccountName, Claimant, RoleArn, RoleIdentity, SessionName},
    secret::Secret,
};

/// The longest error message, in characters: messages end in logs and in a header.
const MAX_MESSAGE: usize = 500;

/// Temporary credentials of one role session.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Credentials {
    pub role: RoleArn,
    /// `ASIA…`; not a secret, it is logged.
    pub access_key_id: String,
    pub secret_access_key: Secret,
    pub session_token: Secret,
    pub issued: SystemTime,
    /// When AWS stops accepting them.
    pub expires: SystemTime,
}

/// The answers of the metadata service, rendered once when the credentials arrive. Two of them are secret.
#[derive(Clone)]
pub struct RenderedAnswers {
    /// Body of `…/security-credentials/`: the role's name, which is no secret.
    pub role_name: Bytes,
    /// Body of `…/security-credentials/<role>`.
    pub plain: Bytes,
    /// Body of `…/security-credentials-extended/<role>`.
    pub extended: Bytes,
}

/// Credentials with their rendered answers.
pub struct IssuedCredentials {
    /// The credentials.
    pub credentials: Credentials,
    /// The answers to pods.
    pub rendered: RenderedAnswers,
    /// The name of the session that STS issued them for, which CloudTrail shows.
    pub session_name: SessionName,
    /// The credentials' lifetime.
    term: schedule::Term,
}

/// Renders the answers. `imds::wire` provides it, so that this layer need not know the format.
pub type Render = fn(&Credentials) -> RenderedAnswers;

/// A source of credentials, such as STS.
pub trait CredentialSource: Send + Sync + 'static {
    /// Requests credentials of `identity`, once. The caller decides about retries by the error's class. `claimant` is a
    /// pod that wants them, for sources where a pod must vouch for the request.
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>>;
}

/// An issuer of ServiceAccount tokens.
pub trait PodTokens: Send + Sync + 'static {
    /// Requests, once, a token of `account` that is bound to the pod `claimant`. The token is used at once.
    fn token<'a>(
        &'a self,
        account: &'a AccountName,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Secret, SourceError>>;
}

/// Why credentials could not be issued.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// What the error means for the next attempt.
    pub class: ErrorClass,
    /// AWS's error code and message, or the failure on the way to AWS. Not a secret.
    pub message: String,
}

/// What an error of a [`CredentialSource`] means for the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// A network error, timeout or 5xx: retried soon, with backoff.
    Retryable,
    /// STS throttles: retried later, and all calls against the same quota slow down.
    Throttled,
    /// The role's sessions may not last this long: retried at once, with a shorter duration that the source has found.
    TooLong,
    /// AWS denies the role until somebody changes its trust policy: retried rarely.
    Denied,
    /// The Kubernetes API rejects the token request, maybe because it does not know the pod yet: retried soon at first,
    /// later as rarely as [`ErrorClass::Denied`].
    Refused,
}

/// The state of one identity's credentials.
#[derive(Clone)]
pub enum State {
    /// In flight, or due soon, or waiting for a limit.
    Pending(Option<Limit>),
    /// Cached and not expired.
    Ready(Arc<IssuedCredentials>),
    /// The last attempt failed, and nothing valid is cached.
    Failed {
        /// Why.
        error: Arc<SourceError>,
        /// When the next attempt is due.
        retry_at: Instant,
    },
}

/// The prefetcher's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The rate of calls to STS, renewals included.
    pub sts_rate: Rate,
    /// STS is not called while a watch of the Kubernetes API has been stale for longer.
    pub max_staleness: Option<Duration>,
}

/// The time since the stalest watch was last heard from; `None` before the first time.
pub type Silence = Box<dyn Fn() -> Option<Duration> + Send + Sync>;

/// Looks up a pod's name, for the log; `None` if the pod is not known any more.
pub type Names = Box<dyn Fn(&Claimant) -> Option<String> + Send + Sync>;

/// Why a call that is due has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue, thiserror::Error)]
pub enum Limit {
    /// The node's budget of calls is used up for now.
    #[error("the node has reached --sts-rate; the request is queued")]
    Node,
    /// STS has throttled the account lately.
    #[error("STS throttles the account, so that the node has slowed down; the request is queued")]
    Throttled,
    /// The calls in flight have reached their limit.
    #[error("STS is slow: too many calls are in flight; the request is queued")]
    InFlight,
    /// The pod's namespace has requested too many new keys.
    #[error("the pod's namespace requested new roles, session names or external ids too often")]
    Namespace,
    /// The pod has requested too many new keys.
    #[error("the pod requested new roles, session names or external ids too often")]
    Pod,
    /// AWS denied the pod's earlier requests.
    #[error("backing off: AWS denied the pod's earlier requests")]
    Denied,
    /// The records of pods are too old to act on.
    #[error("the Kubernetes API has been unavailable for longer than --max-staleness")]
    Stale,
}

// === impl RenderedAnswers ===

impl fmt::Debug for RenderedAnswers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RenderedAnswers")
    }
}

// === impl State ===

impl State {
    /// Why `state` has no credentials; `None` when it has. A missing state is that of an identity that no pod wants (yet).
    #[must_use]
    pub fn lack(state: Option<&Self>) -> Option<String> {
        match state {
            Some(Self::Ready(_)) => None,
            Some(Self::Failed { error, .. }) => Some(error.to_string()),
            Some(Self::Pending(Some(limit))) => Some(limit.to_string()),
            Some(Self::Pending(None)) => Some("AWS has not answered".to_owned()),
            // Until the first lists of the Kubernetes API are complete, nothing is requested.
            None => {
                Some("the agent does not know yet which roles this node's pods request".to_owned())
            }
        }
    }
}

// === impl SourceError ===

impl SourceError {
    /// An error of this class. The text may come from the network, so control characters are dropped, and the length is
    /// limited.
    #[must_use]
    pub fn new(class: ErrorClass, text: &str) -> Self {
        let shown = text.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE);
        Self { class, message: shown.collect() }
    }
}

// === impl Config ===

impl Default for Config {
    /// 10 calls a second, and at once those of as many pods as a node runs, if each has a role of its own: a node that has
    /// just booted waits for STS alone. Calls in flight limit it to a few hundred a second meanwhile, and while STS throttles
    /// the node slows down, whatever is left of the burst. One day: pods keep their credentials during an outage of the
    /// control plane, but not for ever.
    fn default() -> Self {
        Self {
            sts_rate: Rate { burst: 250, period: Duration::from_millis(100) },
            max_staleness: Some(Duration::from_secs(24 * 3600)),
        }
    }
}

// === impl Limit ===

impl Limit {
    /// All limits.
    pub const ALL: [Self; 7] = [
        Self::Node,
        Self::Throttled,
        Self::InFlight,
        Self::Namespace,
        Self::Pod,
        Self::Denied,
        Self::Stale,
    ];

    /// Whether the wait is a short one in the node's queue, whichever pod it is.
    #[must_use]
    pub fn is_queue(self) -> bool {
        matches!(self, Self::Node | Self::Throttled | Self::InFlight)
    }
}

//! Keeps every wanted role's credentials fresh.

mod arrivals;
mod budget;
mod call;
mod call_log;
mod inheritance;
mod metrics;
mod pace;
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
    budget::{Bucket, Rate},
    inheritance::{Inheritance, InheritanceError},
    metrics::{CredentialStates, Metrics},
    pace::Pace,
    prefetch::{Prefetcher, PrefetcherParts},
    refresh::{RefreshError, Refresher},
    store::{CredentialReader, Summary},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use prometheus_client::encoding::EncodeLabelValue;
use tokio::time::Instant;

use crate::{
    role::{AccountName, Claimant, RoleArn, RoleIdentity},
    secret::Secret,
};

/// Characters of an error's message: it ends in logs and in a header.
const MAX_MESSAGE: usize = 500;

/// Temporary credentials of one role session.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The role they are for.
    pub role: RoleArn,
    /// `ASIA…`; not a secret, it is logged.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: Secret,
    /// The session token.
    pub session_token: Secret,
    /// When they were issued.
    pub issued: SystemTime,
    /// When AWS stops accepting them.
    pub expires: SystemTime,
}

/// The answers of the metadata service, rendered once when the credentials arrive; all of both is secret.
#[derive(Clone)]
pub struct RenderedAnswers {
    /// Body of `…/security-credentials/<role>`.
    pub plain: Bytes,
    /// Body of `…/security-credentials-extended/<role>`.
    pub extended: Bytes,
}

/// Credentials with their rendered answers.
pub struct IssuedCredentials {
    /// The credentials.
    pub credentials: Credentials,
    /// What pods are answered.
    pub rendered: RenderedAnswers,
    /// For how long.
    term: schedule::Term,
}

/// Renders the answers; `imds::wire` provides it, so that this layer need not know the format.
pub type Render = fn(&Credentials) -> RenderedAnswers;

/// Where credentials come from.
pub trait CredentialSource: Send + Sync + 'static {
    /// Asks for credentials of `identity`, once; whoever calls it decides about retrying by the error's class.
    /// `claimant` is a pod that wants them now, where a pod must vouch for them; the next attempt is another's.
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>>;
}

/// Who gives out tokens that vouch for pods.
pub trait PodTokens: Send + Sync + 'static {
    /// Asks, once, for a token of `account` that is bound to the pod `claimant`. It is to be used at once.
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
    /// What the prefetcher does about it.
    pub class: ErrorClass,
    /// AWS's error code with its message, or what failed on the way; no secret.
    pub message: String,
}

/// What an error of a [`CredentialSource`] means for the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Network, timeout, 5xx: soon again, backing off.
    Retryable,
    /// STS's token bucket is empty: later, and fewer of all that takes from it.
    Throttled,
    /// The role's sessions may not last so long: at once again, for a shorter one, which the source has found.
    TooLong,
    /// Stays until somebody changes the role's trust policy: probed slowly.
    Denied,
    /// By somebody who may only not have heard of the pod yet: soon again at first, in the end as slowly as what is denied.
    Refused,
}

/// Where one identity's credentials stand.
#[derive(Clone)]
pub enum State {
    /// Asked for, or about to be; or kept back, and why.
    Pending(Option<Limit>),
    /// Held and not expired.
    Ready(Arc<IssuedCredentials>),
    /// The last attempt failed and nothing valid is held.
    Failed {
        /// Why.
        error: Arc<SourceError>,
        /// When it is tried again.
        retry_at: Instant,
    },
}

/// What the engine is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Calls to STS, renewals included.
    pub sts_rate: Rate,
    /// Nothing is asked of STS while a watch of the Kubernetes API has shown no sign of life for longer.
    pub max_staleness: Option<Duration>,
}

/// Tells how long what tells of the pods' roles has shown no sign of life; `None` before the first.
pub type Silence = Box<dyn Fn() -> Option<Duration> + Send + Sync>;

/// Tells a pod's name, for the log; `None` where it is not known any more.
pub type Names = Box<dyn Fn(&Claimant) -> Option<String> + Send + Sync>;

/// Why something that is due is not asked for yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue, thiserror::Error)]
pub enum Limit {
    /// The node's calls to STS are used up for now.
    #[error("the node asks STS as often as --sts-rate lets it; this is next in turn")]
    Node,
    /// STS has throttled the account lately.
    #[error("STS throttles the account, so that the node asks it less often; this is next in turn")]
    Throttled,
    /// As many calls as may be under way are.
    #[error("STS is slow: as many calls as may be under way are")]
    InFlight,
    /// The pod's namespace has asked for too many new things.
    #[error("the pod's namespace asked for new roles, session names or external ids too often")]
    Namespace,
    /// The pod has.
    #[error("the pod asked for new roles, session names or external ids too often")]
    Pod,
    /// AWS denied the pod what it asked for before.
    #[error("AWS denied the pod what it asked for before, so that it waits for longer each time")]
    Denied,
    /// What pods want may not be true any more.
    #[error("the Kubernetes API has been silent for longer than --max-staleness")]
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
    /// Why there are no credentials in `state`, which is `None` for what nobody wants (yet); `None` when there are.
    #[must_use]
    pub fn lack(state: Option<&Self>) -> Option<String> {
        match state {
            Some(Self::Ready(_)) => None,
            Some(Self::Failed { error, .. }) => Some(error.to_string()),
            Some(Self::Pending(Some(limit))) => Some(limit.to_string()),
            Some(Self::Pending(None)) => Some("AWS has not answered".to_owned()),
            // As long as lists of the Kubernetes API are missing, nothing is asked for.
            None => Some("the agent does not know yet what this node's pods want".to_owned()),
        }
    }
}

// === impl SourceError ===

impl SourceError {
    /// An error of this class. Whoever answered may have written the text: what would break a line is left out, and
    /// so is what is too long for one.
    #[must_use]
    pub fn new(class: ErrorClass, text: &str) -> Self {
        let shown = text.chars().filter(|character| !character.is_control()).take(MAX_MESSAGE);
        Self { class, message: shown.collect() }
    }
}

// === impl Config ===

impl Default for Config {
    /// 10 calls a second, 100 at once: a node of pods that all have roles of their own is ready ten seconds
    /// after its start, and 50 such nodes that start together stay below STS's default quota of 600 a second.
    /// A day: an outage of the control plane takes nothing away, but who is cut off for good holds nothing for ever.
    fn default() -> Self {
        Self {
            sts_rate: Rate { burst: 100, period: Duration::from_millis(100) },
            max_staleness: Some(Duration::from_secs(24 * 3600)),
        }
    }
}

// === impl Limit ===

impl Limit {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Node,
        Self::Throttled,
        Self::InFlight,
        Self::Namespace,
        Self::Pod,
        Self::Denied,
        Self::Stale,
    ];

    /// Whether the wait is short and says nothing about who waits.
    #[must_use]
    pub fn is_queue(self) -> bool {
        matches!(self, Self::Node | Self::Throttled | Self::InFlight)
    }
}

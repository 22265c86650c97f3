//! Keeps every wanted role's credentials fresh.

mod metrics;
mod prefetch;
mod schedule;
mod store;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::SystemTime};

pub use self::{
    metrics::{Held, Metrics},
    prefetch::Prefetcher,
    store::{CredentialReader, Summary},
};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::{
    role::{RoleArn, RoleIdentity},
    secret::Secret,
};

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

/// The answers of the metadata service, rendered once when the credentials arrive.
#[derive(Clone, Debug)]
pub struct Rendered {
    /// Body of `…/security-credentials/<role>`.
    pub plain: Bytes,
    /// Body of `…/security-credentials-extended/<role>`.
    pub extended: Bytes,
}

/// Credentials with their rendered answers.
pub struct Issued {
    /// The credentials.
    pub credentials: Credentials,
    /// What pods are answered.
    pub rendered: Rendered,
}

/// Renders the answers; `imds::wire` provides it, so that this layer need not know the format.
pub type Render = fn(&Credentials) -> Rendered;

/// Where credentials come from.
pub trait CredentialSource: Send + Sync + 'static {
    /// Asks for credentials of `identity`, once; whoever calls it decides about retrying by the error's class.
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>>;
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
    /// STS's token bucket is empty: later, and fewer.
    Throttled,
    /// Stays until somebody changes the role's trust policy: probed slowly.
    Denied,
}

/// Where one identity's credentials stand.
#[derive(Clone)]
pub enum State {
    /// Asked for, or about to be.
    Pending,
    /// Held and not expired.
    Ready(Arc<Issued>),
    /// The last attempt failed and nothing valid is held.
    Failed {
        /// Why.
        error: Arc<SourceError>,
        /// When it is tried again.
        retry_at: SystemTime,
    },
}

//! The errors of requests, and their statuses.
//!
//! Statuses are chosen by the reactions of real SDKs. Bodies are empty, because some clients take the body of any answer
//! for the name of a role.

use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::EncodeLabelValue;

use super::UpstreamError;
use kiam_core::{
    pods::{NotFound, Unattested},
    policy::Refusal,
    role::QuotedText,
};

/// Why a request is rejected. The agent retries none of these; clients decide by the status.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection belongs to no pod.
    #[error("{}", unattested(.0))]
    Unattested(Unattested),
    /// The pod is not known, or the connection may not be the pod's.
    #[error(transparent)]
    Pod(#[from] NotFound),
    /// The request went through a proxy.
    #[error("requests that a proxy forwards (X-Forwarded-For, Forwarded, Via) are rejected")]
    ForwardedFor,
    /// The `Host` header names another service: DNS rebinding.
    #[error("host {0} is not the instance metadata service")]
    Host(QuotedText),
    /// HTTP/1.1 without `Host`, or with several.
    #[error("exactly one Host header is needed")]
    HostMissing,
    /// The request has a body.
    #[error("a request body is not accepted")]
    Body,
    /// The path does not support the method.
    #[error("method not allowed, only {allow}")]
    Method {
        /// The supported methods.
        allow: &'static str,
    },
    /// The path is not allowed, or not normalised.
    #[error("path not allowed")]
    Path,
    /// The path of a token request has a version other than `latest`.
    #[error("tokens are issued at /latest/api/token only")]
    DatedToken,
    /// The token's lifetime is missing or out of range.
    #[error("x-aws-ec2-metadata-token-ttl-seconds must be 1 to 21600")]
    Ttl,
    /// A token is required and missing.
    #[error("a token is required (IMDSv2)")]
    TokenMissing,
    /// The token is malformed, expired or another pod's.
    #[error("the token is not valid")]
    TokenInvalid,
    /// The policy denies the pod its role, or the pod has none.
    #[error(transparent)]
    Refused(Refusal),
    /// The request is for a role that is not the pod's.
    #[error("role {0} is not the pod's")]
    OtherRole(QuotedText),
    /// The request is for an earlier role of the pod. After a 404, clients that cache the name list the roles again.
    #[error("role {0} is no longer the pod's")]
    FormerRole(QuotedText),
    /// AWS denies the pod its role, and waiting does not help. As with [`Refusal`], the answer is that of a pod without a role:
    /// SDKs retry after a 503, some for minutes.
    #[error("no credentials: {reason}")]
    Denied {
        /// AWS's error.
        reason: String,
    },
    /// There are no valid credentials now.
    #[error("no credentials yet: {reason}")]
    NoCredentials {
        /// The last error.
        reason: String,
        /// The time until the next call to STS, at the soonest.
        retry_after: Duration,
    },
    /// The real service gave no valid answer.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// The kind of a request's path, as far as the status of an error depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// The path of one role's credentials. A role that was just listed never gets a 404 here, after which Ruby's SDK would
    /// retry for ever. A role that is no longer listed does, so that the SDK lists the new one.
    Credentials,
    /// Any other path.
    Elsewhere,
}

/// The kinds of [`Error`], for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(missing_docs, reason = "named as the variants of `Error`, `NotFound` and `Refusal`")]
pub enum ErrorKind {
    Unattested,
    PodUnknown,
    AddressMismatch,
    AddressAmbiguous,
    WatchStale,
    ForwardedFor,
    Host,
    Body,
    Method,
    Path,
    DatedToken,
    Ttl,
    TokenMissing,
    TokenInvalid,
    NoRole,
    Forbidden,
    OtherRole,
    FormerRole,
    Denied,
    NoCredentials,
    Upstream,
}

// === impl Error ===

impl Error {
    /// The status of the answer.
    #[must_use]
    pub fn status(&self, kind: PathKind) -> StatusCode {
        let absent = match kind {
            PathKind::Credentials => StatusCode::FORBIDDEN,
            PathKind::Elsewhere => StatusCode::NOT_FOUND,
        };
        match self {
            Self::Body | Self::HostMissing | Self::Ttl => StatusCode::BAD_REQUEST,
            // Only a 401 makes SDKs leave the v1 mode that they fall back to.
            Self::TokenMissing | Self::TokenInvalid => StatusCode::UNAUTHORIZED,
            Self::Unattested(_)
            | Self::Pod(NotFound::AddressMismatch | NotFound::Ambiguous | NotFound::Stale)
            | Self::ForwardedFor
            | Self::Host(_)
            | Self::DatedToken
            | Self::OtherRole(_) => StatusCode::FORBIDDEN,
            Self::Pod(NotFound::Unknown) | Self::Refused(_) | Self::Denied { .. } => absent,
            Self::Path | Self::FormerRole(_) | Self::Upstream(UpstreamError::NotFound) => {
                StatusCode::NOT_FOUND
            }
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::NoCredentials { .. } | Self::Upstream(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The error's kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unattested(_) => ErrorKind::Unattested,
            Self::Pod(NotFound::Unknown) => ErrorKind::PodUnknown,
            Self::Pod(NotFound::AddressMismatch) => ErrorKind::AddressMismatch,
            Self::Pod(NotFound::Ambiguous) => ErrorKind::AddressAmbiguous,
            Self::Pod(NotFound::Stale) => ErrorKind::WatchStale,
            Self::ForwardedFor => ErrorKind::ForwardedFor,
            Self::Host(_) | Self::HostMissing => ErrorKind::Host,
            Self::Body => ErrorKind::Body,
            Self::Method { .. } => ErrorKind::Method,
            Self::Path => ErrorKind::Path,
            Self::DatedToken => ErrorKind::DatedToken,
            Self::Ttl => ErrorKind::Ttl,
            Self::TokenMissing => ErrorKind::TokenMissing,
            Self::TokenInvalid => ErrorKind::TokenInvalid,
            Self::Refused(Refusal::NoRole(_)) => ErrorKind::NoRole,
            Self::Refused(_) => ErrorKind::Forbidden,
            Self::OtherRole(_) => ErrorKind::OtherRole,
            Self::FormerRole(_) => ErrorKind::FormerRole,
            Self::Denied { .. } => ErrorKind::Denied,
            Self::NoCredentials { .. } => ErrorKind::NoCredentials,
            Self::Upstream(_) => ErrorKind::Upstream,
        }
    }
}

/// The message for the client, which must not reveal other pods. The log names them.
fn unattested(why: &Unattested) -> String {
    let text = match why {
        Unattested::NoEntry | Unattested::Contested(_) | Unattested::Selftest => {
            return why.to_string();
        }
        Unattested::Unknown { not_found, .. } => return not_found.to_string(),
        Unattested::NotAPod(_) => "the connection was opened outside of pods",
        Unattested::Gone(_) => "the cgroup that the connection was opened in is gone",
        Unattested::OtherPod { .. } => "the connection is another pod's",
        Unattested::Unreadable(_) => "the kernel's record of the connection can't be read",
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::pods::PodUid;

    #[test]
    fn a_connection_that_is_another_pods_is_told_nothing_of_that() {
        let uid = |digit: &str| {
            PodUid::new(
                &["8", "4", "4", "4", "12"].map(|n| digit.repeat(n.parse().unwrap())).join("-"),
            )
        };
        let secret = ["aaaa", "bbbb", "4242", "kubepods"];
        for why in [
            Unattested::OtherPod { caller: uid("a"), listener: uid("b") },
            Unattested::NotAPod(QuotedText::new("/kubepods/podaaaa/c")),
            Unattested::Gone(4242),
            Unattested::Unreadable("cgroup 4242: /kubepods/podaaaa".to_owned()),
        ] {
            let log = why.to_string();
            assert!(secret.iter().any(|part| log.contains(part)), "{log}");
            let answer = Error::Unattested(why).to_string();
            assert!(!secret.iter().any(|part| answer.contains(part)), "{answer}");
        }
    }
}

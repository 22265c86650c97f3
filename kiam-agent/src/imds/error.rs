//! Why a request is not answered, and what the client sees of it.
//!
//! Statuses are chosen for what real SDKs make of them; bodies are empty, for some clients take the
//! body of any answer for the name of a role.

use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::EncodeLabelValue;

use super::UpstreamError;
use kiam_core::{
    pods::{NotFound, Unattested},
    policy::Refusal,
    role::QuotedText,
};

/// Why a request is refused. Nothing here is worth a retry by the agent; clients judge by the status.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection belongs to no pod.
    #[error("{}", unattested(.0))]
    Unattested(Unattested),
    /// The pod is not known, or the connection can't be its.
    #[error(transparent)]
    Pod(#[from] NotFound),
    /// The request went through a proxy.
    #[error("requests that a proxy forwards (X-Forwarded-For, Forwarded, Via) are refused")]
    ForwardedFor,
    /// The `Host` header names another service: DNS rebinding.
    #[error("host {0} is not the instance metadata service")]
    Host(QuotedText),
    /// HTTP/1.1 without `Host`, or with several.
    #[error("exactly one Host header is needed")]
    HostMissing,
    /// A body where none belongs.
    #[error("a request body is not accepted")]
    Body,
    /// A method that the path does not have.
    #[error("method not allowed, only {allow}")]
    Method {
        /// The methods it has.
        allow: &'static str,
    },
    /// Not a path of ours, or not its normalised spelling.
    #[error("path not allowed")]
    Path,
    /// `PUT` of a token at a version other than `latest`.
    #[error("tokens are issued at /latest/api/token only")]
    DatedToken,
    /// The token's life is not given or out of range.
    #[error("x-aws-ec2-metadata-token-ttl-seconds must be 1 to 21600")]
    Ttl,
    /// `--imdsv2=required`, and no token.
    #[error("a token is required (IMDSv2)")]
    TokenMissing,
    /// A token that is malformed, expired or another pod's.
    #[error("the token is not valid")]
    TokenInvalid,
    /// Policy refuses the pod its role, or it has none.
    #[error(transparent)]
    Refused(Refusal),
    /// Another role than the pod's is asked for.
    #[error("role {0} is not the pod's")]
    OtherRole(QuotedText),
    /// A role that was the pod's before is asked for. Clients that keep the name list the roles again after a 404.
    #[error("role {0} is no longer the pod's")]
    FormerRole(QuotedText),
    /// AWS does not let the pod have its role, and no waiting mends that. As with [`Refusal`], it is as if there were no
    /// role: SDKs take a 503 for something that passes, and some ask again for minutes.
    #[error("no credentials: {reason}")]
    Denied {
        /// What AWS answered.
        reason: String,
    },
    /// There are no valid credentials now.
    #[error("no credentials yet: {reason}")]
    NoCredentials {
        /// What AWS answered last.
        reason: String,
        /// When STS is asked again, at the soonest.
        retry_after: Duration,
    },
    /// The real service does not answer, or not with what was asked.
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
}

/// Where an error is answered, as far as the status depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathKind {
    /// The path of one role's credentials. A role that was just listed is never answered 404 here: Ruby's
    /// SDK would ask again without end. One that is not listed any more is, so that it lists the new one.
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
    /// The status that clients are answered.
    #[must_use]
    pub fn status(&self, kind: PathKind) -> StatusCode {
        let absent = match kind {
            PathKind::Credentials => StatusCode::FORBIDDEN,
            PathKind::Elsewhere => StatusCode::NOT_FOUND,
        };
        match self {
            Self::Body | Self::HostMissing | Self::Ttl => StatusCode::BAD_REQUEST,
            // Only a 401 ends the v1 mode that SDKs fall into and stay in.
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

    /// Its kind.
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
            Self::Refused(Refusal::NoRole) => ErrorKind::NoRole,
            Self::Refused(_) => ErrorKind::Forbidden,
            Self::OtherRole(_) => ErrorKind::OtherRole,
            Self::FormerRole(_) => ErrorKind::FormerRole,
            Self::Denied { .. } => ErrorKind::Denied,
            Self::NoCredentials { .. } => ErrorKind::NoCredentials,
            Self::Upstream(_) => ErrorKind::Upstream,
        }
    }
}
/// What may be said of a connection to whoever has it: nothing of other pods, to which it may belong. The log names them.
fn unattested(why: &Unattested) -> String {
    let text = match why {
        Unattested::NoEntry | Unattested::Contested(_) | Unattested::Selftest => {
            return why.to_string();
        }
        Unattested::Unknown { not_found, .. } => return not_found.to_string(),
        Unattested::NotAPod(_) => "the connection was opened outside of pods",
        Unattested::Gone(_) => "the cgroup that the connection was opened in is gone",
        Unattested::OtherPod { .. } => "the connection is another pod's",
        Unattested::Unreadable(_) => "the kernel's record of the connection is of no use",
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

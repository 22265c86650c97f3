//! The errors of requests and watches, and what they mean for the next one.

use std::time::Duration;

use kube::core::Status;

use super::{describe, metrics::RestartReason, sieve::InvalidJson, wire::Malformed};

/// The status codes of a version from which the server can't watch: it is not a number, is no longer in the history, or is
/// newer than the server's cache
/// (<https://kubernetes.io/docs/reference/using-api/api-concepts/#unavailable-resource-versions>).
const UNAVAILABLE_VERSION: [u16; 3] = [400, 410, 504];

/// Why a request failed. All failures are retried.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{}", describe(.0))]
    Request(#[from] kube::Error),
    #[error("can't build the request: {0}")]
    Build(#[from] kube::core::request::Error),
    #[error("the list is malformed: {0}")]
    List(#[from] Malformed),
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("the server rejects the watch: {0}")]
    Watch(String),
    #[error("the server opens watches and ends them at once")]
    Ends,
    #[error("the server rejects a watch from the version of its own list (410)")]
    Expires,
}

/// Why a watch ended.
pub(super) enum WatchEnd {
    Closed,
    Stalled,
    Expired,
    Rewound,
    /// The server did not open it within this time.
    Unopened(Duration),
    Failed(Failure),
}

// === impl Failure ===

impl From<InvalidJson> for Failure {
    fn from(broken: InvalidJson) -> Self {
        Self::List(broken.into())
    }
}

impl Failure {
    /// Whether the server's cache is older than the requested version: 504, "Too large resource version".
    pub(super) fn is_of_future(&self) -> bool {
        matches!(self, Self::Request(kube::Error::Api(status)) if status.code == 504)
    }
}

// === impl WatchEnd ===

impl WatchEnd {
    pub(super) fn restart_reason(&self) -> RestartReason {
        match self {
            Self::Closed => RestartReason::Closed,
            Self::Stalled | Self::Unopened(_) => RestartReason::Stalled,
            Self::Expired => RestartReason::Expired,
            Self::Rewound => RestartReason::Rewound,
            Self::Failed(_) => RestartReason::Failed,
        }
    }

    pub(super) fn of(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(&status),
            error => Self::Failed(error.into()),
        }
    }

    pub(super) fn of_status(status: &Status) -> Self {
        if UNAVAILABLE_VERSION.contains(&status.code) {
            return Self::Expired;
        }
        let Status { code, reason, message, .. } = status;
        Self::Failed(Failure::Watch(format!("{code} {reason}: {message}")))
    }
}

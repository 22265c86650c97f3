//! Why the agent can't start.

use std::{io, path::Path};

use crate::{cluster, imds, sts};
use kiam_kernel::{intercept, sandboxes};

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// An address can't be listened on.
    #[error("{flag} {address}: {source}")]
    Bind {
        /// The address's flag.
        flag: &'static str,
        /// The address.
        address: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The region is needed and not known.
    #[error("the region is not known: set --region, as {upstream} does not report it: {error}")]
    Region {
        /// The real IMDS.
        upstream: String,
        /// Its answer.
        error: imds::UpstreamError,
    },
    /// The base ARN is needed and not known.
    #[error(
        "the base ARN is not known: set --role-base-arn, as the node's profile does not report it: {0}"
    )]
    BaseArn(imds::UpstreamError),
    /// The kernel's part.
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
    /// Kubernetes.
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    /// STS.
    #[error(transparent)]
    Sts(#[from] sts::Error),
    /// The key of session tokens.
    #[error(transparent)]
    Key(#[from] imds::KeyError),
    /// The system gave no socket for StatsD.
    #[error("--statsd: {0}")]
    Statsd(#[source] io::Error),
    /// The next agent can't be given the sockets.
    #[error("the sockets for the agent after this one: {0}")]
    Handover(#[source] io::Error),
    /// The pods' sandboxes can't be followed.
    #[error("pods' sandboxes can't be followed: {0}; --path=node goes without")]
    Sandboxes(#[source] sandboxes::Error),
    /// The system gave no thread.
    #[error("the system gives no thread: {0}")]
    Thread(#[source] io::Error),
    /// A bug of the agent.
    #[error("a part of the agent panicked")]
    Panicked,
}

// === impl Error ===

impl Error {
    /// Whether somebody else listens at an address.
    pub(super) fn is_in_use(&self) -> bool {
        matches!(self, Self::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }

    /// A socket in the state folder can't be listened on.
    pub(super) fn state(state_dir: &Path, name: &str) -> impl Fn(io::Error) -> Self + use<> {
        let address = state_dir.join(name).display().to_string();
        move |source| Self::Bind { flag: "--state-dir", address: address.clone(), source }
    }
}

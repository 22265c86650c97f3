//! Why the agent can't start.

use std::{io, path::Path};

use crate::{cluster, sts};
use kiam_kernel::{intercept, sandboxes};
use kiam_requests::imds;

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{flag} {address}: {source}")]
    Bind {
        flag: &'static str,
        address: String,
        #[source]
        source: io::Error,
    },
    #[error("the region is not known: set --region, as {upstream} does not report it: {error}")]
    Region { upstream: String, error: imds::UpstreamError },
    #[error(
        "the base ARN is not known: set --role-base-arn, as the node's profile does not report it: {0}"
    )]
    BaseArn(imds::UpstreamError),
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
    #[error(transparent)]
    Cluster(#[from] cluster::Error),
    #[error(transparent)]
    Sts(#[from] sts::Error),
    #[error(transparent)]
    Key(#[from] imds::KeyError),
    #[error("--statsd: {0}")]
    Statsd(#[source] io::Error),
    #[error("--audit: {0}")]
    Audit(#[source] io::Error),
    #[error("the sockets for the agent after this one: {0}")]
    Handover(#[source] io::Error),
    #[error("pods' sandboxes can't be followed: {0}; --path=node goes without")]
    Sandboxes(#[source] sandboxes::Error),
    #[error("the system gives no thread: {0}")]
    Thread(#[source] io::Error),
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

//! Why the agent can't start.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{cluster, config::Unreported, handover, sts};
use kiam_kernel::{intercept, sandboxes};
use kiam_requests::imds;

/// Why the agent can't start.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Sockets(#[from] handover::Error),
    #[error("--state-dir {}: {source}", path.display())]
    State {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Unreported(#[from] Unreported),
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
    #[error("pods' sandboxes can't be followed: {0}; --path=node goes without")]
    Sandboxes(#[source] sandboxes::Error),
    #[error("the system gives no thread: {0}")]
    Thread(#[source] io::Error),
}

// === impl Error ===

impl Error {
    /// A socket in the state folder can't be listened on.
    pub(super) fn state(state_dir: &Path, name: &str) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = state_dir.join(name);
        move |source| Self::State { path, source }
    }
}

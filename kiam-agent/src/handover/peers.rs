//! The other agents of this node.

use std::path::PathBuf;

use tracing::warn;

use super::PeerJudge;
use kiam_core::credentials::Inheritance;
use kiam_kernel::intercept;

/// The agents that are met at the handover socket. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    pub(super) state_dir: PathBuf,
    /// Who may hand over, or take: see [`intercept::may_hand_over`].
    pub(super) trusted: PeerJudge,
}

// === impl Peers ===

impl Peers {
    /// Those that use `state_dir`; without an interceptor all of root's processes are trusted.
    #[must_use]
    pub fn new(state_dir: PathBuf, interceptor: Option<&intercept::Config>) -> Self {
        let trusted = match interceptor.cloned() {
            Some(config) => {
                PeerJudge::new(move |token, pid| intercept::may_hand_over(token, &config, pid))
            }
            None => PeerJudge::new(|_, _| true),
        };
        Self { state_dir, trusted }
    }

    /// The cached credentials of the one that serves; none where they can't be read, which costs calls to STS alone.
    pub async fn credentials(&self) -> Inheritance {
        let Some(cached) = self.sealed_credentials().await else {
            return Inheritance::default();
        };
        Inheritance::read(&cached).unwrap_or_else(|error| {
            warn!(%error, "The other agent's cached credentials can't be read; requesting all of them from STS");
            Inheritance::default()
        })
    }
}

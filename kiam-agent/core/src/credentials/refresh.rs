//! Calls to STS out of turn, for an operator who fixed a role and does not want to wait for the retry.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::SourceError;
use crate::role::RoleIdentity;

/// Refreshes that may wait at once.
const AT_ONCE: usize = 16;

/// The channel by which an operator gets a call's outcome.
pub(super) type RefreshReply = oneshot::Sender<Result<(), Arc<SourceError>>>;

/// An identity to request now, with the channel for the outcome.
pub(super) type RefreshRequest = (RoleIdentity, RefreshReply);

/// A handle that requests calls out of turn. Such a call counts against the node's budget, and no pod's.
#[derive(Clone)]
pub struct Refresher(mpsc::Sender<RefreshRequest>);

/// Why a refresh failed.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// [`AT_ONCE`] refreshes wait already.
    #[error("too many refreshes at once")]
    Busy,
    /// No pod requests the role (any more).
    #[error("no pod requests the role")]
    Unwanted,
    /// The call did not begin or end in time.
    #[error("no answer within {0:?}; the request stays queued")]
    Unanswered(Duration),
    /// The call failed.
    #[error("{0}")]
    Failed(Arc<SourceError>),
}

/// A refresher, and the receiver of its requests.
pub(super) fn channel() -> (Refresher, mpsc::Receiver<RefreshRequest>) {
    let (sender, receiver) = mpsc::channel(AT_ONCE);
    (Refresher(sender), receiver)
}

// === impl Refresher ===

impl Refresher {
    /// Requests credentials of `identity` at once, and waits up to `patience` for the outcome.
    ///
    /// # Errors
    ///
    /// [`RefreshError`].
    pub async fn refresh(
        &self,
        identity: RoleIdentity,
        patience: Duration,
    ) -> Result<(), RefreshError> {
        let (reply, answer) = oneshot::channel();
        self.0.try_send((identity, reply)).map_err(|_| RefreshError::Busy)?;
        match timeout(patience, answer).await {
            Ok(Ok(answer)) => answer.map_err(RefreshError::Failed),
            Ok(Err(_)) => Err(RefreshError::Unwanted),
            Err(_) => Err(RefreshError::Unanswered(patience)),
        }
    }
}

//! Asking STS out of turn, for operators: somebody mended a role, and does not want to wait for the next attempt.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::SourceError;
use crate::role::RoleIdentity;

/// How many operators may ask at once.
const AT_ONCE: usize = 16;

/// One who waits for what comes of a call.
pub(super) type RefreshReply = oneshot::Sender<Result<(), Arc<SourceError>>>;

/// What is to be asked for now, and who wants to know.
pub(super) type RefreshRequest = (RoleIdentity, RefreshReply);

/// Has the prefetcher ask at once. Such a call counts for the node, as all do, and for no pod.
#[derive(Clone)]
pub struct Refresher(mpsc::Sender<RefreshRequest>);

/// Why it was not refreshed.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// As many operators as may ask at once do.
    #[error("too many ask for refreshes at once")]
    Busy,
    /// No pod wants it, or none does any more.
    #[error("nobody wants it")]
    Unwanted,
    /// It could not be asked for in time, or was not answered.
    #[error("no answer within {0:?}; it is still going to be asked for")]
    Unanswered(Duration),
    /// AWS gave none.
    #[error("{0}")]
    Failed(Arc<SourceError>),
}

/// A refresher, and where what it asks for comes out.
pub(super) fn channel() -> (Refresher, mpsc::Receiver<RefreshRequest>) {
    let (sender, receiver) = mpsc::channel(AT_ONCE);
    (Refresher(sender), receiver)
}

// === impl Refresher ===

impl Refresher {
    /// Asks for `identity`, whenever it was asked for last, and waits for what comes of it for as long as `patience`
    /// lasts.
    ///
    /// # Errors
    ///
    /// [`RefreshError`].
    pub async fn refresh(
        &self,
        identity: RoleIdentity,
        patience: Duration,
    ) -> Result<(), RefreshError> {
        let (waiting, answer) = oneshot::channel();
        self.0.try_send((identity, waiting)).map_err(|_| RefreshError::Busy)?;
        match timeout(patience, answer).await {
            Ok(Ok(answer)) => answer.map_err(RefreshError::Failed),
            Ok(Err(_)) => Err(RefreshError::Unwanted),
            Err(_) => Err(RefreshError::Unanswered(patience)),
        }
    }
}

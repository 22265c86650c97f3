//! Answers operators until the very end.

use std::sync::Arc;

use tokio::{net::UnixListener, task::JoinHandle};

use super::{Operations, serve_unix};
use kiam_core::lifecycle::{DrainSignal, drain};

/// What answers operators over this process's own socket. It outlives the drain: an agent that was superseded is alive and not
/// ready.
pub struct Operators {
    end: DrainSignal,
    task: JoinHandle<()>,
}

// === impl Operators ===

impl Operators {
    /// Answers at `socket` from now on.
    #[must_use]
    pub fn answer(socket: UnixListener, operations: Arc<Operations>) -> Self {
        let (end, ending) = drain();
        let task = tokio::spawn(serve_unix(socket, operations, ending));
        Self { end, task }
    }

    /// Answers no longer.
    pub async fn end(self) {
        self.end.start();
        // A panic in it was logged.
        let _ = self.task.await;
    }
}

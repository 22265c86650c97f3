//! Answers operators until the very end.

use std::sync::Arc;

use tokio::{net::UnixListener, task::JoinHandle};

use crate::admin::{self, Operations};
use kiam_core::lifecycle::{DrainSignal, drain};

/// What answers operators over this process's own socket. It outlives the drain: an agent that was superseded is alive and not
/// ready.
pub(super) struct Operators {
    end: DrainSignal,
    task: JoinHandle<()>,
}

// === impl Operators ===

impl Operators {
    /// Answers at `socket` from now on.
    pub(super) fn answer(socket: UnixListener, operations: Arc<Operations>) -> Self {
        let (end, ending) = drain();
        let task = tokio::spawn(admin::serve_unix(socket, operations, ending));
        Self { end, task }
    }

    pub(super) async fn end(self) {
        self.end.start();
        // A panic in it was logged.
        let _ = self.task.await;
    }
}

//! Whether the records of pods are too old to act on.

use std::time::Duration;

use tracing::{info, warn};

/// Whether the watches have been stale for longer than `--max-staleness`. Logs each change.
#[derive(Debug, Default)]
pub(super) struct Staleness {
    is_over: bool,
}

// === impl Staleness ===

impl Staleness {
    /// Whether `silence` is longer than `most`.
    pub(super) fn is_over(&mut self, most: Option<Duration>, silence: Option<Duration>) -> bool {
        let is_over = most.zip(silence).is_some_and(|(most, now)| now > most);
        if is_over && !self.is_over {
            warn!(
                ?silence,
                "Calls to STS are suspended: the Kubernetes API has been unavailable for longer than --max-staleness"
            );
        } else if self.is_over && !is_over {
            info!("Calls to STS are resumed: the Kubernetes API is available again");
        }
        self.is_over = is_over;
        is_over
    }
}

//! Whether what pods want can still be believed.

use std::time::Duration;

use tracing::{info, warn};

/// Whether the Kubernetes API has been silent for too long; says so when that changes.
#[derive(Debug, Default)]
pub(super) struct Staleness {
    is_over: bool,
}

// === impl Staleness ===

impl Staleness {
    /// Whether the `silence` is longer than it may be at `most`.
    pub(super) fn is_over(&mut self, most: Option<Duration>, silence: Option<Duration>) -> bool {
        let is_over = most.zip(silence).is_some_and(|(most, now)| now > most);
        if is_over && !self.is_over {
            warn!(
                ?silence,
                "Asking STS for nothing until the Kubernetes API tells again what pods want"
            );
        } else if self.is_over && !is_over {
            info!("Asking STS again: the Kubernetes API tells what pods want");
        }
        self.is_over = is_over;
        is_over
    }
}

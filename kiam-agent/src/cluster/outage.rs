//! Says once that the API server fails, and once that it no longer does.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::metrics::Resource;

/// Whether one kind's requests fail at present.
#[derive(Debug)]
pub(super) struct Outage {
    resource: Resource,
    since: Mutex<Option<Instant>>,
}

// === impl Outage ===

impl Outage {
    pub(super) fn new(resource: Resource) -> Self {
        Self { resource, since: Mutex::default() }
    }

    /// A request failed. What is known stays in use.
    pub(super) fn failed(&self, error: &dyn std::error::Error) {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        if since.is_some() {
            debug!(resource = ?self.resource, %error, "Kubernetes API still fails");
        } else {
            *since = Some(Instant::now());
            warn!(resource = ?self.resource, %error, "Kubernetes API fails, going on with what is known");
        }
    }

    /// The server answered.
    pub(super) fn over(&self) {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(since) = since {
            let seconds = since.elapsed().as_secs();
            info!(resource = ?self.resource, outage.seconds = seconds, "Kubernetes API answers again");
        }
    }
}

//! The prefetcher's dependencies.

use std::sync::Arc;

use tokio::sync::watch;

use super::{CredentialSource, Metrics, Names, Render, Silence};
use crate::{clock::Clock, lifecycle::Latch, role::WantedRoles};

/// The prefetcher's dependencies.
pub struct PrefetcherParts {
    /// The source of credentials.
    pub source: Arc<dyn CredentialSource>,
    /// Renders the answers.
    pub render: Render,
    /// The clock by which they expire.
    pub clock: Clock,
    /// The roles that pods request and are allowed.
    pub wanted: watch::Receiver<WantedRoles>,
    /// The age of that information.
    pub silence: Silence,
    /// The names of pods, for the log.
    pub names: Names,
    /// The prefetcher's metrics.
    pub metrics: Metrics,
    /// Set once every identity of the first wanted set has an answer, credentials or an error.
    pub first_pass: Latch,
}

//! Asks again for what the agent's start must know: early after boot the service may not answer yet.

use std::time::Duration;

use tokio::time::sleep;
use tracing::warn;

use super::{Upstream, UpstreamError};
use kiam_core::role::BaseArn;

/// How often the service is asked, at most.
const ATTEMPTS: u32 = 30;
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

// === impl Upstream ===

impl Upstream {
    /// As [`Self::region`], asked again for half a minute.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`] of the last attempt.
    pub async fn region_at_start(&self) -> Result<String, UpstreamError> {
        ask(|| self.region()).await
    }

    /// As [`Self::base_arn`], asked again for half a minute.
    ///
    /// # Errors
    ///
    /// [`UpstreamError`] of the last attempt.
    pub async fn base_arn_at_start(&self) -> Result<BaseArn, UpstreamError> {
        ask(|| self.base_arn()).await
    }
}

async fn ask<T, F>(question: impl Fn() -> F) -> Result<T, UpstreamError>
where
    F: Future<Output = Result<T, UpstreamError>>,
{
    let mut attempt = 1;
    loop {
        match question().await {
            Err(error) if attempt < ATTEMPTS => {
                if attempt == 1 {
                    warn!(%error, "The real metadata service does not answer; asking again");
                }
                attempt += 1;
                sleep(PAUSE).await;
            }
            answer => return answer,
        }
    }
}

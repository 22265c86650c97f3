//! One kind's list and watch, for ever.

use std::{future::Future, time::Duration};

use futures::StreamExt as _;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::{
    Config, Metrics,
    metrics::{Outcome, Restart},
    resources::{Event, Events, Listed, Watched},
};
use crate::{lifecycle::Latch, pods::PodIndex};

/// A list that takes longer has failed.
const LIST_DEADLINE: Duration = Duration::from_secs(30);
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(30);
/// Lists for pods that were asked for and are not known: at most one in this time.
const MISS_INTERVAL: Duration = Duration::from_secs(1);

/// Feeds the index with one kind.
pub(super) struct Feed<'a, W> {
    pub(super) resource: W,
    pub(super) index: &'a PodIndex,
    pub(super) synced: Latch,
    pub(super) metrics: Metrics,
    pub(super) config: &'a Config,
}

/// Where a feed stands.
struct Progress {
    /// The version up to which everything is known; `None`: a list is needed.
    version: Option<String>,
    backoff: Duration,
    /// Whether the trouble that is going on was told already.
    warned: bool,
    next_list: Instant,
    next_miss: Instant,
    /// A pod was asked for that is not known, and no list was made since.
    missed: bool,
}

// === impl Feed ===

impl<W: Watched> Feed<'_, W> {
    /// Runs until it is dropped. `missed` returns when a list may help.
    pub(super) async fn run<F: Future<Output = ()>>(&self, missed: impl Fn() -> F) {
        let now = Instant::now();
        let mut progress = Progress {
            version: None,
            backoff: FIRST_BACKOFF,
            warned: false,
            next_list: now + jittered(self.config.sync_interval),
            next_miss: now,
            missed: false,
        };
        loop {
            let result = match progress.version.clone() {
                None => self.list(&mut progress).await,
                Some(version) => self.watch(&version, &mut progress, &missed).await,
            };
            let Err(error) = result else { continue };
            if !progress.warned {
                warn!(resource = W::NAME, %error, "Kubernetes API is not answering; what is known is kept");
                progress.warned = true;
            }
            sleep(jittered(progress.backoff)).await;
            progress.backoff = LAST_BACKOFF.min(progress.backoff * 2);
        }
    }

    /// Lists everything, and leaves the version to watch from.
    async fn list(&self, progress: &mut Progress) -> Result<(), String> {
        let Listed { records, version } = self.fetch().await?;
        let count = records.len();
        let number = version.parse().ok();
        let known = progress.version.as_deref().and_then(|known| known.parse::<u64>().ok());
        self.index.heard();
        progress.backoff = FIRST_BACKOFF;
        if known > number {
            debug!(resource = W::NAME, "List is older than what the watch told; left out");
            return Ok(());
        }
        W::reset(self.index, records, number);
        self.synced.set();
        if progress.version.is_none() {
            info!(resource = W::NAME, count, generation.metadata = %version, "Listed");
        }
        progress.warned = false;
        progress.version = Some(version);
        Ok(())
    }

    async fn fetch(&self) -> Result<Listed<W::Record>, String> {
        let listed = match timeout(LIST_DEADLINE, self.resource.list()).await {
            Ok(listed) => listed.map_err(|error| error.to_string()),
            Err(_) => Err(format!("the list took longer than {LIST_DEADLINE:?}")),
        };
        let outcome = if listed.is_ok() { Outcome::Ok } else { Outcome::Error };
        self.metrics.listed(W::NAME, outcome);
        listed
    }

    /// Watches from `version` until the watch ends in some way.
    async fn watch<F: Future<Output = ()>>(
        &self,
        version: &str,
        progress: &mut Progress,
        missed: &impl Fn() -> F,
    ) -> Result<(), String> {
        let opened = timeout(LIST_DEADLINE, self.resource.watch(version)).await;
        let mut events = match opened {
            Ok(Ok(events)) => events,
            Ok(Err(kube::Error::Api(status))) if status.code == 410 => {
                return self.expired(progress);
            }
            Ok(Err(error)) => return self.restart(Restart::Error, error.to_string()),
            Err(_) => return self.restart(Restart::Stalled, "the watch did not open".to_owned()),
        };
        loop {
            let next = timeout(self.config.stall, events.next());
            tokio::select! {
                next = next => match next {
                    Ok(next) => match self.take(next, progress) {
                        Some(result) => return result,
                        None => continue,
                    },
                    Err(_) => {
                        let error = format!("no event and no bookmark for {:?}", self.config.stall);
                        return self.restart(Restart::Stalled, error);
                    }
                },
                () = sleep_until(progress.next_list) => {
                    progress.next_list = Instant::now() + jittered(self.config.sync_interval);
                }
                () = missed(), if !progress.missed => {
                    progress.missed = true;
                    continue;
                }
                () = sleep_until(progress.next_miss), if progress.missed => {
                    progress.missed = false;
                    progress.next_miss = Instant::now() + MISS_INTERVAL;
                }
            }
            self.drain_ready(&mut events, progress);
            self.list(progress).await?;
        }
    }

    /// Applies what has arrived already, so that a list is compared with the newest version known.
    fn drain_ready(&self, events: &mut Events<W::Record>, progress: &mut Progress) {
        use futures::FutureExt as _;
        while let Some(Some(Ok(event))) = events.next().now_or_never() {
            if self.take(Some(Ok(event)), progress).is_some() {
                break;
            }
        }
    }

    /// Applies one event; `Some` when the watch is over.
    fn take(
        &self,
        next: Option<Result<Event<W::Record>, kube::Error>>,
        progress: &mut Progress,
    ) -> Option<Result<(), String>> {
        let event = match next {
            None => {
                self.metrics.restarted(W::NAME, Restart::Ended);
                return Some(Ok(()));
            }
            Some(Err(kube::Error::SerdeError(error))) => {
                warn!(resource = W::NAME, %error, "Watch event can't be read; left out");
                return None;
            }
            Some(Err(error)) => return Some(self.restart(Restart::Error, error.to_string())),
            Some(Ok(event)) => event,
        };
        self.index.heard();
        self.metrics.event(W::NAME);
        progress.backoff = FIRST_BACKOFF;
        progress.warned = false;
        let version = match event {
            Event::Applied(record, version) => {
                if let Some(record) = record {
                    W::apply(self.index, record);
                }
                version
            }
            Event::Deleted(record, version) => {
                if let Some(record) = record {
                    W::delete(self.index, record);
                }
                version
            }
            Event::Bookmark(version) => version,
            Event::Error(410, _) => return Some(self.expired(progress)),
            Event::Error(code, message) => {
                return Some(self.restart(Restart::Error, format!("{code}: {message}")));
            }
        };
        if !version.is_empty() {
            progress.version = Some(version);
        }
        None
    }

    fn expired(&self, progress: &mut Progress) -> Result<(), String> {
        debug!(resource = W::NAME, "Version is too old for the API server; listing anew");
        self.metrics.restarted(W::NAME, Restart::Expired);
        progress.version = None;
        Ok(())
    }

    fn restart(&self, reason: Restart, error: String) -> Result<(), String> {
        self.metrics.restarted(W::NAME, reason);
        Err(error)
    }
}

/// Between three quarters and five quarters of `duration`, so that nodes don't act together.
fn jittered(duration: Duration) -> Duration {
    duration.mul_f64(0.75 + fastrand::f64() / 2.0)
}

//! Reports by Events why pods get no credentials.
//!
//! Level-triggered: the present troubles are scanned periodically and compared with those reported. So no change of a
//! record or of credentials is missed, nothing is queued, and the code that serves pods does not depend on Events.

mod api;
mod ledger;
mod trouble;

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, sleep};
use tracing::{Instrument as _, debug, info_span, warn};

use self::{
    api::{Failure, WriteOutcome, Writer},
    ledger::Ledger,
    trouble::{Subject, Trouble},
};
use super::{
    backoff::{Backoff, jittered},
    metrics::{EventOutcome, Metrics},
};
use kiam_core::{
    clock::Clock,
    credentials::CredentialReader,
    lifecycle::Drain,
    pods::{Pod, PodReader},
    policy::RolePolicy,
};

/// The delay of the next attempt after the API server denied the agent to write Events.
const FORBIDDEN: Duration = Duration::from_secs(600);

/// A function to the exposure of a pod that may hold the node's credentials.
pub type Exposure = Box<dyn Fn(&Pod) -> Option<Exposed> + Send + Sync>;

/// The exposure of a pod that may hold the node's credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exposed {
    /// When the last of these credentials have expired.
    pub until: SystemTime,
    /// Whether it is older than the interception.
    pub age: Age,
}

/// The age of a pod, compared with the interception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// The pod ran before it was intercepted.
    Older,
    /// The pod's processes can't be read, or are too many.
    Unknown,
}

/// The dependencies of Events.
pub struct EventParts {
    /// All known pods.
    pub pods: PodReader,
    /// Whether a pod is served by this agent.
    pub serves: Box<dyn Fn(&Pod) -> bool + Send + Sync>,
    /// The roles that pods may have.
    pub policy: RolePolicy,
    /// The cached credentials.
    pub credentials: CredentialReader,
    /// Until when a pod may hold the node's credentials, if it may.
    pub exposed: Exposure,
    /// The clock.
    pub clock: Clock,
    /// The time between two scans.
    pub period: Duration,
    /// Whether Events are written. Otherwise mistakes of namespaces are only logged.
    pub send: bool,
}

/// The task that writes Events about this node's pods. Nothing waits for it.
pub struct Events {
    pub(super) client: kube::Client,
    /// The node's name, if it is known.
    pub(super) node: Option<String>,
    pub(super) metrics: Metrics,
}

/// The state of one run.
struct Reporter {
    parts: EventParts,
    writer: Writer,
    metrics: Metrics,
    ledger: Ledger,
    backoff: Backoff,
    not_before: Instant,
    /// Whether a warning was logged that Events can't be written.
    warned: bool,
}

// === impl Age ===

impl fmt::Display for Age {
    /// The beginning of a sentence about the pod.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Older => "the pod ran before the node's metadata service was intercepted and",
            Self::Unknown => {
                "the agent can't tell whether the pod ran before the node's metadata service was intercepted, so the pod"
            }
        })
    }
}

// === impl Events ===

impl Events {
    /// Reports troubles until the drain begins.
    pub async fn run(self, parts: EventParts, mut drain: Drain) {
        let instance = self.node.unwrap_or_else(|| "kiam-agent".to_owned());
        let writer = Writer { client: self.client, instance, clock: parts.clock.clone() };
        let reporter = Reporter {
            parts,
            writer,
            metrics: self.metrics,
            ledger: Ledger::default(),
            backoff: Backoff::new(),
            not_before: Instant::now(),
            warned: false,
        };
        tokio::select! {
            () = drain.started() => {}
            () = reporter.run().instrument(info_span!("events")) => {}
        }
    }
}

// === impl Reporter ===

impl Reporter {
    async fn run(mut self) {
        loop {
            let changes = self.ledger.take(trouble::scan(&self.parts), Instant::now());
            changes.troubles.iter().for_each(log);
            self.metrics.count_events(EventOutcome::Dropped, changes.dropped);
            if self.parts.send && Instant::now() >= self.not_before {
                self.report().await;
            }
            sleep(jittered(self.parts.period)).await;
        }
    }

    /// Reports all troubles that are due, until the API server fails.
    async fn report(&mut self) {
        while let Some((trouble, count)) = self.ledger.next(Instant::now()) {
            let written = self.writer.write(&trouble, count).await;
            let now = Instant::now();
            self.metrics.count_events(outcome(&written), 1);
            match &written {
                Ok(_) => {
                    self.backoff.reset();
                    self.warned = false;
                }
                Err(Failure::Rejected(message)) => {
                    warn!(?trouble, message, "The Kubernetes API rejected an Event")
                }
                Err(failure) => {
                    let pause = match failure {
                        Failure::Forbidden(_) => FORBIDDEN,
                        _ => self.backoff.next(),
                    };
                    self.not_before = now + pause;
                    self.warn(failure);
                    return;
                }
            }
            self.ledger.record(&trouble, count, now);
        }
    }

    fn warn(&mut self, failure: &Failure) {
        if self.warned {
            debug!(error = %failure, "Writing Events still fails");
        } else {
            warn!(error = %failure, "Writing Events fails; pods don't show why they get no credentials");
            self.warned = true;
        }
    }
}

fn outcome(written: &Result<WriteOutcome, Failure>) -> EventOutcome {
    match written {
        Ok(WriteOutcome::Created) => EventOutcome::Created,
        Ok(WriteOutcome::Repeated | WriteOutcome::Exists) => EventOutcome::Repeated,
        Err(Failure::Rejected(_)) => EventOutcome::Refused,
        Err(_) => EventOutcome::Failed,
    }
}

/// Logs a new trouble. Rejected requests of pods are logged where they are answered.
fn log(trouble: &Trouble) {
    match &trouble.subject {
        Subject::Namespace(name) => {
            warn!(
                namespace = name,
                reason = trouble.reason,
                "A namespace has a mistake: {}",
                trouble.note
            );
        }
        Subject::Pod { namespace, name, .. } => {
            debug!(
                pod.name = name,
                pod.namespace = namespace,
                reason = trouble.reason,
                "{}",
                trouble.note
            );
        }
    }
}

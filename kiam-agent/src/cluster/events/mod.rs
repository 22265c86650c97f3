//! Tells, by Events, why pods get no credentials.
//!
//! Level-triggered: what is wrong is looked for again and again, as it is then, and compared with what was told. So no
//! change of a record or of credentials can be missed, nothing is queued, and whoever answers pods knows nothing of it.

mod api;
mod ledger;
mod trouble;

use std::time::{Duration, SystemTime};

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

/// How long nothing is tried after the agent was told that it may not write Events.
const FORBIDDEN: Duration = Duration::from_secs(600);

/// Says until when a pod may hold the node's credentials, if it may.
pub type Exposure = Box<dyn Fn(&Pod) -> Option<SystemTime> + Send + Sync>;

/// What tells what is wrong.
pub struct EventParts {
    /// Whose Events.
    pub pods: PodReader,
    /// Which of those pods are this agent's.
    pub serves: Box<dyn Fn(&Pod) -> bool + Send + Sync>,
    /// What they may have.
    pub policy: RolePolicy,
    /// What they have.
    pub credentials: CredentialReader,
    /// Until when a pod may hold the node's credentials, if it may.
    pub exposed: Exposure,
    /// Tells the time.
    pub clock: Clock,
    /// How often to look.
    pub period: Duration,
    /// Whether there are to be Events; else mistakes of namespaces are only logged.
    pub send: bool,
}

/// Writes Events about this node's pods. Whatever becomes of that delays nobody.
pub struct Events {
    pub(super) client: kube::Client,
    /// The node's name, if it is known.
    pub(super) node: Option<String>,
    pub(super) metrics: Metrics,
}

/// One run's state.
struct Reporter {
    parts: EventParts,
    writer: Writer,
    metrics: Metrics,
    ledger: Ledger,
    backoff: Backoff,
    not_before: Instant,
    /// Whether it was logged that Events can't be written.
    complained: bool,
}

// === impl Events ===

impl Events {
    /// Tells of what is wrong until the drain begins.
    pub async fn run(self, parts: EventParts, mut drain: Drain) {
        let instance = self.node.unwrap_or_else(|| "kiam-agent".to_owned());
        let writer = Writer { client: self.client, instance, clock: parts.clock.clone() };
        let teller = Reporter {
            parts,
            writer,
            metrics: self.metrics,
            ledger: Ledger::default(),
            backoff: Backoff::new(),
            not_before: Instant::now(),
            complained: false,
        };
        tokio::select! {
            () = drain.started() => {}
            () = teller.run().instrument(info_span!("events")) => {}
        }
    }
}

// === impl Reporter ===

impl Reporter {
    async fn run(mut self) {
        loop {
            let news = self.ledger.take(trouble::look(&self.parts), Instant::now());
            news.troubles.iter().for_each(log);
            self.metrics.count_events(EventOutcome::Dropped, news.dropped);
            if self.parts.send && Instant::now() >= self.not_before {
                self.tell().await;
            }
            sleep(jittered(self.parts.period)).await;
        }
    }

    /// Tells of everything that is due, until the API server fails.
    async fn tell(&mut self) {
        while let Some((trouble, count)) = self.ledger.next(Instant::now()) {
            let written = self.writer.write(&trouble, count).await;
            let now = Instant::now();
            self.metrics.count_events(outcome(&written), 1);
            match &written {
                Ok(_) => {
                    self.backoff.reset();
                    self.complained = false;
                }
                Err(Failure::Rejected(message)) => warn!(?trouble, message, "An Event was refused"),
                Err(failure) => {
                    let pause = match failure {
                        Failure::Forbidden(_) => FORBIDDEN,
                        _ => self.backoff.next(),
                    };
                    self.not_before = now + pause;
                    self.complain(failure);
                    return;
                }
            }
            self.ledger.told(&trouble, count, now);
        }
    }

    fn complain(&mut self, failure: &Failure) {
        if self.complained {
            debug!(error = %failure, "Events still can't be written");
        } else {
            warn!(error = %failure, "Events can't be written, so that pods don't show why they get no credentials");
            self.complained = true;
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

/// What is wrong with a namespace is logged when it is found; a pod's refusals are where it asks.
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

//! The agent from the end of its start to its own end.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use tokio::{task::JoinError, time::Instant, time::timeout_at};
use tracing::{error, info, warn};

use super::process::Process;
use crate::{
    admin::Operators,
    handover::{Course, Departure, Request, Signals, StandingOffer},
};
use kiam_core::lifecycle::ENDING;
use kiam_kernel::intercept;

/// The agent, running.
pub(super) struct App {
    process: Process,
    operators: Operators,
    offer: StandingOffer,
    departure: Departure,
    /// `--bpffs`, with `--detach-on-exit`.
    detach: Option<PathBuf>,
    /// Whether a newer agent serves.
    superseded: bool,
}

// === impl App ===

impl App {
    pub(super) fn new(
        process: Process,
        operators: Operators,
        offer: StandingOffer,
        departure: Departure,
        detach: Option<PathBuf>,
    ) -> Self {
        Self { process, operators, offer, departure, detach, superseded: false }
    }

    /// Runs until a part ends that must not, or the system asks for the end by `signals`. At SIGTERM the agent serves on as
    /// long as a successor can come. One that was superseded before stays until it is asked to end: the kubelet would start
    /// another one instead, and that would take over in its turn.
    pub(super) async fn run(mut self, signals: &mut Signals) -> ExitCode {
        loop {
            tokio::select! {
                request = signals.next() => {
                    if self.ends_at_once(request) {
                        self.stop().await;
                        return ExitCode::SUCCESS;
                    }
                }
                queue = self.offer.took_over(), if !self.superseded => {
                    self.supersede(queue);
                    if self.departure.is_planned() {
                        self.stop().await;
                        return ExitCode::SUCCESS;
                    }
                }
                () = self.departure.due() => {
                    warn!("No agent has taken over within the grace period");
                    self.stop().await;
                    return ExitCode::SUCCESS;
                }
                Some(ended) = self.process.tasks.join_next() => {
                    if panicked(&ended) || !self.superseded {
                        error!("A part of the agent ended that must not; ending");
                        self.stop().await;
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
    }

    /// Finishes requests that have begun, and ends. The kernel programs stay, unless `--detach-on-exit` says otherwise and
    /// no other agent goes on.
    async fn stop(mut self) {
        let limit = self.departure.limit();
        if !self.superseded
            && let Some(queue) = self.offer.finish(limit).await
        {
            self.supersede(queue);
        }
        // Only now is it known whether another agent serves.
        match (self.superseded, self.detach.is_some()) {
            (true, _) => info!("Ending; a newer agent serves"),
            (false, true) => info!("Draining; the kernel programs are detached afterwards"),
            (false, false) => info!("Draining; the kernel programs stay and deny pods"),
        }
        self.process.signal.start();
        self.finish_work(limit).await;
        if let Some(bpffs) = self.detach.take_if(|_| !self.superseded) {
            detach(&bpffs);
        }
        self.operators.end().await;
    }

    /// Waits until every part has ended, or gives up at the `limit`: the system would kill the agent before it has detached
    /// anything.
    async fn finish_work(&mut self, limit: Option<Instant>) {
        let tasks = &mut self.process.tasks;
        let all = async { while tasks.join_next().await.is_some() {} };
        match limit {
            None => all.await,
            Some(limit) => {
                if timeout_at(limit, all).await.is_err() {
                    warn!("The grace period ends; unfinished requests are given up");
                    self.process.tasks.abort_all();
                }
            }
        }
    }

    /// Whether the agent serves nobody if it goes on.
    fn ends_at_once(&self, request: Request) -> bool {
        let course = match self.superseded {
            true => Course::AtOnce,
            false => self.departure.plan(request),
        };
        match course {
            Course::AtOnce => info!(signal = %request, "Asked to end"),
            Course::ServeOn(service) => {
                info!(
                    signal = %request,
                    "Asked to end; serving until another agent takes over, for {} s at most. A second signal ends that",
                    service.as_secs()
                );
                // Never set again.
                let _ = self.process.readiness.latch(ENDING);
            }
        }
        course == Course::AtOnce
    }

    /// Another agent serves: requests that were accepted are finished, and the lease is left to that agent.
    fn supersede(&mut self, queue: bool) {
        match self.departure.is_planned() {
            true => info!("A newer agent serves"),
            false => info!("A newer agent serves; this one is idle until it is asked to end"),
        }
        self.superseded = true;
        // Never set again.
        let _ = self.process.readiness.latch("handed over to a newer agent");
        self.process.signal.hand_over(queue);
    }
}

fn panicked(ended: &Result<(), JoinError>) -> bool {
    ended.as_ref().is_err_and(JoinError::is_panic)
}

fn detach(bpffs: &Path) {
    match intercept::uninstall(bpffs) {
        Ok(removed) => {
            for what in removed {
                info!(%what, "Removed");
            }
            info!("Pods reach the node's metadata service directly now");
        }
        Err(failure) => error!(error = %failure, "Kernel programs can't be detached"),
    }
}

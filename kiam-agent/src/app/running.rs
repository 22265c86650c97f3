//! The agent from its start to its end.

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    net::UnixListener,
    sync::Notify,
    task::{JoinError, JoinHandle},
    time::{Instant, timeout_at},
};
use tracing::{error, info, warn};

use super::{
    App, Error,
    ending::{Course, Request, Signals},
    listeners::trusted,
};
use crate::{
    admin::{self, Operations},
    config::Config,
    handover::{self, HandoverContent, Offer, OfferEnd},
};
use kiam_core::lifecycle::{DrainSignal, ENDING, drain};
use kiam_kernel::intercept;

/// How long the end waits for a successor that has the sockets to say that it serves.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(5);
/// How long before the limit of the drain that ends, so that open connections have some time.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// What answers operators until the very end: a process that was relieved is alive and not ready.
pub(super) struct Operators {
    end: DrainSignal,
    task: JoinHandle<()>,
}

/// The standing offer to the agent after this one.
pub(super) struct Successor {
    withdraw: DrainSignal,
    /// `None` once it has ended.
    offer: Option<JoinHandle<OfferEnd>>,
}

// === impl Operators ===

impl Operators {
    /// Answers over this process's own socket from now on.
    pub(super) fn answer(socket: UnixListener, operations: Arc<Operations>) -> Self {
        let (end, ending) = drain();
        let task = tokio::spawn(admin::serve_unix(socket, operations, ending));
        Self { end, task }
    }

    async fn end(self) {
        self.end.start();
        // A panic in it was logged.
        let _ = self.task.await;
    }
}

// === impl Successor ===

impl Successor {
    /// Offers what this agent `gives` from now on. `reassert` is told when a successor gave up half way.
    pub(super) fn await_next(
        config: &Config,
        gives: HandoverContent,
        reassert: Arc<Notify>,
    ) -> Result<Self, Error> {
        let offer =
            Offer::bind(&config.state_dir).map_err(Error::state(config, handover::SOCKET))?;
        let (withdraw, withdrawn) = drain();
        let abandoned = move || reassert.notify_one();
        let offer = tokio::spawn(offer.stand(gives, trusted(config), abandoned, withdrawn));
        Ok(Self { withdraw, offer: Some(offer) })
    }

    /// Returns once one has taken over, with whether it has the sockets; never, when the offer ended otherwise.
    async fn took_over(&mut self) -> bool {
        if let Some(offer) = &mut self.offer {
            let ended = offer.await;
            self.offer = None;
            if let Ok(OfferEnd::Taken { queue }) = ended {
                return queue;
            }
        }
        std::future::pending().await
    }

    /// Withdraws the offer; a successor that was about to take over may still, as [`Self::took_over`] says, but not
    /// so late that nothing would be left until the `limit` of the drain.
    async fn finish(&mut self, limit: Option<Instant>) -> Option<bool> {
        self.withdraw.start();
        let mut offer = self.offer.take()?;
        let usual = Instant::now() + EXCHANGE_DEADLINE;
        let deadline = limit.map_or(usual, |limit| usual.min(limit - LAST_REQUESTS));
        let ended = timeout_at(deadline, &mut offer).await;
        offer.abort();
        match ended {
            Ok(Ok(OfferEnd::Taken { queue })) => Some(queue),
            Ok(_) => None,
            Err(_) => {
                warn!(
                    "An agent has the sockets and may serve at any moment: the lease and the kernel programs are left to it"
                );
                Some(false)
            }
        }
    }
}

impl App {
    /// Finishes what has begun and ends. The kernel programs stay, unless `--detach-on-exit` says otherwise and
    /// no other agent goes on.
    async fn stop(mut self) {
        let limit = self.departure.limit();
        if !self.relieved
            && let Some(queue) = self.successor.finish(limit).await
        {
            self.relieve(queue);
        }
        // Only now is it known whether another agent serves.
        match (self.relieved, self.detach.is_some()) {
            (true, _) => info!("Ending; a newer agent serves"),
            (false, true) => info!("Draining; the kernel programs are detached afterwards"),
            (false, false) => info!("Draining; the kernel programs stay and deny pods"),
        }
        self.drain.start();
        self.finish_work(limit).await;
        if let Some(bpffs) = self.detach.take_if(|_| !self.relieved) {
            detach(&bpffs);
        }
        self.operators.end().await;
    }

    /// Waits until every part has ended, or gives up at the `limit`: the system would kill the agent before it has detached
    /// anything.
    async fn finish_work(&mut self, limit: Option<Instant>) {
        let tasks = &mut self.tasks;
        let all = async { while tasks.join_next().await.is_some() {} };
        match limit {
            None => all.await,
            Some(limit) => {
                if timeout_at(limit, all).await.is_err() {
                    warn!("The grace period ends; what is not finished is given up");
                    self.tasks.abort_all();
                }
            }
        }
    }

    /// Runs until a part ends that must not, or the system asks for the end by `signals`. At SIGTERM the agent serves on as
    /// long as a successor can come. One that was relieved before stays until it is asked to end: the kubelet would start one
    /// that ends again, and that would take over in its turn.
    pub(super) async fn run(mut self, signals: &mut Signals) -> ExitCode {
        loop {
            tokio::select! {
                request = signals.next() => {
                    if self.ends_at_once(request) {
                        self.stop().await;
                        return ExitCode::SUCCESS;
                    }
                }
                queue = self.successor.took_over(), if !self.relieved => {
                    self.relieve(queue);
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
                Some(ended) = self.tasks.join_next() => {
                    if panicked(&ended) || !self.relieved {
                        error!("A part of the agent ended that must not; ending");
                        self.stop().await;
                        return ExitCode::FAILURE;
                    }
                }
            }
        }
    }

    /// Whether there is nobody to serve on for.
    fn ends_at_once(&self, request: Request) -> bool {
        let course = match self.relieved {
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
                let _ = self.readiness.latch(ENDING);
            }
        }
        course == Course::AtOnce
    }

    /// Another agent serves: what was accepted is finished, and the lease is left to it.
    fn relieve(&mut self, queue: bool) {
        match self.departure.is_planned() {
            true => info!("A newer agent serves"),
            false => info!("A newer agent serves; this one is idle until it is asked to end"),
        }
        self.relieved = true;
        // Never set again.
        let _ = self.readiness.latch("handed over to a newer agent");
        self.drain.hand_over(queue);
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
        Err(failure) => error!(error = %failure, "Kernel programs not taken away"),
    }
}

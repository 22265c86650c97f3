//! The agent from its start to its end.

use std::{path::Path, pin::Pin, process::ExitCode, sync::Arc, time::Duration};

use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::{JoinError, JoinHandle},
    time::timeout,
};
use tracing::{error, info, warn};

use super::{App, Error, listeners::trusted};
use crate::{
    admin::{self, Operations},
    config::Config,
    handover::{self, Ended, Gives, Offer},
    intercept,
    lifecycle::{DrainSignal, drain},
};

/// How long the end waits for a successor that has the sockets to say that it serves.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(5);

/// What answers operators until the very end: a process that was relieved is alive and not ready.
pub(super) struct Operators {
    end: DrainSignal,
    task: JoinHandle<()>,
}

/// The standing offer to the agent after this one.
pub(super) struct Successor {
    withdraw: DrainSignal,
    /// `None` once it has ended.
    offer: Option<JoinHandle<Ended>>,
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
        gives: Gives,
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
            if let Ok(Ended::Taken { queue }) = ended {
                return queue;
            }
        }
        std::future::pending().await
    }

    /// Withdraws the offer; a successor that was about to take over may still, as [`Self::took_over`] says.
    async fn finish(&mut self) -> Option<bool> {
        self.withdraw.start();
        let mut offer = self.offer.take()?;
        let ended = timeout(EXCHANGE_DEADLINE, &mut offer).await;
        offer.abort();
        match ended {
            Ok(Ok(Ended::Taken { queue })) => Some(queue),
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
    pub async fn stop(mut self) {
        if !self.relieved
            && let Some(queue) = self.successor.finish().await
        {
            self.relieve(queue);
        }
        self.drain.start();
        while self.tasks.join_next().await.is_some() {}
        if let Some(bpffs) = self.detach.take_if(|_| !self.relieved) {
            detach(&bpffs);
        }
        self.operators.end().await;
    }

    /// Runs until a part ends that must not, or the system asks for the end, which `asked` tells. An agent that was relieved stays:
    /// the kubelet would start one that ends again, and that would take over in its turn.
    pub(super) async fn run(
        mut self,
        mut asked: Pin<&mut impl Future<Output = &'static str>>,
    ) -> ExitCode {
        loop {
            tokio::select! {
                name = &mut asked => {
                    match (self.relieved, self.detach.is_some()) {
                        (true, _) => info!(signal = name, "Ending; a newer agent serves"),
                        (_, true) => info!(signal = name, "Draining; then the kernel programs are taken away"),
                        _ => info!(signal = name, "Draining; the kernel programs stay and refuse pods"),
                    }
                    self.stop().await;
                    return ExitCode::SUCCESS;
                }
                queue = self.successor.took_over(), if !self.relieved => self.relieve(queue),
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

    /// Another agent serves: what was accepted is finished, and the lease is left to it.
    fn relieve(&mut self, queue: bool) {
        info!("A newer agent serves; this one is idle until it is told to end");
        self.relieved = true;
        // Never set again.
        let _ = self.readiness.latch("handed over to a newer agent");
        self.drain.hand_over(queue);
    }
}

fn panicked(ended: &Result<(), JoinError>) -> bool {
    ended.as_ref().is_err_and(JoinError::is_panic)
}

/// Returns the name of the signal by which the system asks for the end.
pub(super) async fn asked_to_end() -> &'static str {
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    }
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

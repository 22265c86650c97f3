//! Builds the parts, starts them in order, returns the bound addresses.
//!
//! Order where an agent runs: what is pinned stays as it is → pods and namespaces → first credentials, what that agent has and the rest →
//! its listening sockets → replace the kernel programs → serve. Where none does: new sockets → attach or replace the
//! programs, which deny pods from then on, while pods and first credentials come → serve. Then, in both cases: guard → that
//! agent is relieved → self-test → ready. At the end: not ready → a successor, as long as the grace period allows → drain → exit,
//! with the programs left where they are, so that pods are denied and never passed through.

mod build;
mod ending;
mod error;
mod guard;
mod kernel;
mod knowledge;
mod listeners;
mod running;
mod selftest;
mod upstream;
mod warm_up;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use tokio::task::JoinSet;
use tracing::{error, info, warn};

pub use self::error::Error;
use self::{
    ending::{Departure, Signals},
    running::{Operators, Successor},
};
use crate::config::{self, Config};
use kiam_core::{
    lifecycle::{DrainSignal, Readiness},
    secret::forbid_core_dumps,
    telemetry::{Chain, LogLevel},
};

/// The agent, running.
pub struct App {
    bound: Bound,
    readiness: Readiness,
    drain: DrainSignal,
    /// What ends when the drain begins, and must not before.
    tasks: JoinSet<()>,
    operators: Operators,
    successor: Successor,
    /// Whether a newer agent serves.
    relieved: bool,
    /// `--bpffs`, with `--detach-on-exit`.
    detach: Option<PathBuf>,
    departure: Departure,
}

/// Where the agent listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// For pods: one a family.
    pub pods: Vec<SocketAddr>,
    /// `/live`, `/ready`, `/metrics`.
    pub admin: SocketAddr,
    /// `/metrics` alone.
    pub metrics: Option<SocketAddr>,
}

// === impl App ===

impl App {
    /// Builds and starts everything; returns once pods are served.
    ///
    /// # Errors
    ///
    /// Whatever keeps a part from being built, which no waiting mends.
    pub async fn start(config: Config, log_level: LogLevel) -> Result<Self, Error> {
        build::start(config, log_level).await
    }

    /// Where it listens.
    #[must_use]
    pub fn bound(&self) -> &Bound {
        &self.bound
    }

    /// What it waits for.
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }
}

/// The whole process, for `main`.
#[must_use]
pub fn main(config: Config) -> ExitCode {
    let log_level = match config.logs.init() {
        Ok(level) => level,
        Err(error) => {
            eprintln!("kiam-agent: {error}");
            return ExitCode::FAILURE;
        }
    };
    // Before anything secret is read.
    if let Err(failure) = forbid_core_dumps() {
        warn!(error = %failure, "A crash may leave a core dump, which has credentials in it");
    }
    info!("{}", config::version());
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(failure) => {
            error!(error = %failure, "No runtime");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        // Heard from the first moment: process 1 of a container has no default that would end it.
        let mut signals = Signals::hear();
        let started = tokio::select! {
            biased;
            request = signals.next() => {
                info!(signal = %request, "Ending before it serves");
                // As the signal itself would end it: what is half done must not go on while it is undone, and an
                // agent that runs puts its own programs back only then.
                std::process::exit(0)
            }
            started = App::start(config, log_level) => started,
        };
        match started {
            Ok(app) => app.run(&mut signals).await,
            Err(failure) => {
                error!(error = %Chain(&failure), "The agent can't start");
                ExitCode::FAILURE
            }
        }
    })
}

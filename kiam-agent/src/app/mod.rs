//! Builds the parts, starts them in order, returns the bound addresses.
//!
//! Order: what is pinned stays as it is (it refuses, or an agent that runs serves) → pods and namespaces → first
//! credentials, bounded → listening sockets, that agent's or new ones → attach or replace the kernel programs →
//! serve → that agent is relieved → ready. At the end: not ready → drain → exit, with the programs left where
//! they are, so that pods are refused and never passed through.

mod build;
mod error;
mod keeper;
mod listeners;
mod operations;
mod running;
mod upstream;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use tokio::{task::JoinSet, time::timeout};
use tracing::{error, info, warn};

pub use self::error::Error;
use self::running::{Operators, Successor};
use crate::{
    config::{self, Config},
    handover,
    lifecycle::{DrainSignal, Readiness},
};

/// How long the start waits for pods and first credentials before it serves without them: a node whose
/// API server or STS is away must still refuse in an orderly way.
const FIRST_PASS: Duration = Duration::from_secs(10);

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
    pub async fn start(config: Config) -> Result<Self, Error> {
        build::start(config).await
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
    operations::remember(log_level);
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
        match App::start(config).await {
            Ok(app) => app.run().await,
            Err(failure) => {
                error!(error = %failure, "The agent can't start");
                ExitCode::FAILURE
            }
        }
    })
}

/// Waits for what should be there before the first pod is answered, and serves without it after a while; but not
/// in the place of an agent that serves, which has what this one lacks.
async fn warm_up(readiness: &Readiness, config: &Config) {
    const NAMES: [&str; 3] = ["pods", "namespaces", "first credentials"];
    let mut warned = false;
    while !first_pass(readiness, &NAMES).await
        && handover::is_served(&config.state_dir, &listeners::trusted(config)).await
    {
        if !warned {
            warn!(pending = ?readiness.pending(), "Not taking over before everything is there");
            warned = true;
        }
    }
    if NAMES.iter().any(|name| readiness.pending().contains(name)) {
        warn!(pending = ?readiness.pending(), "Serving before everything is there");
    }
}

/// Waits, for a while, until what has these names is there; whether it is.
async fn first_pass(readiness: &Readiness, names: &[&'static str]) -> bool {
    let complete = async {
        while readiness.pending().iter().any(|name| names.contains(name)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(FIRST_PASS, complete).await.is_ok()
}

//! Starts the agent's parts in order, and runs them to the end.
//!
//! The start is a chain of types. Each step consumes the one before, so that no other order compiles:
//!
//! 1. [`Prepared`](prepared::Prepared): the kernel is checked, pods and credentials are on their way, operators are answered.
//!    What is attached and what listens stays as it is.
//! 2. [`Bound`](bound::Bound): this agent has the attach lock and its sockets. If another agent serves, this one is warm first,
//!    and has received that agent's sockets.
//! 3. [`Attached`](attached::Attached): the kernel programs are attached, or replaced in place. If no agent serves, pods are
//!    denied from here on.
//! 4. [`Serving`](serving::Serving): pods are served, inside their network namespaces and on the node.
//! 5. [`Guarded`](guarded::Guarded): the guard is set, the self-test runs, the lease is renewed, the keeper keeps the programs.
//! 6. [`App`](running::App): the other agent is superseded, and the next one finds this one.
//!
//! At the end: not ready → a successor, as long as the grace period allows → drain → exit. The programs stay attached, so that
//! pods are denied and never pass through.

mod attached;
mod bound;
mod error;
mod guarded;
mod knowledge;
mod prepared;
mod process;
mod running;
mod serving;
mod take_over;

use std::{io, num::NonZero, process::ExitCode, thread};

use tokio::runtime::{Builder, Runtime};
use tracing::{debug, error, info, warn};

use self::{error::Error, prepared::Prepared, running::App};
use crate::{
    config::{self, Config},
    handover::Signals,
};
use kiam_core::{
    secret::forbid_core_dumps,
    telemetry::{Chain, LogLevel},
};
use kiam_kernel::sys::give_memory_back;
use kiam_requests::serve;

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
    if !give_memory_back() {
        debug!("The allocator keeps memory that is freed, as it is not glibc's");
    }
    info!("{}", config::version());
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(failure) => {
            error!(error = %failure, "The system gives no runtime");
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
                // As the signal itself would end it: a step that has begun must not go on while it is undone, and an
                // agent that runs reattaches its own programs only then.
                std::process::exit(0)
            }
            started = start(config, log_level) => started,
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

/// The runtime of everything but the thread of the pods' sandboxes and that of the lease.
///
/// Two workers at least, so that one goes on while the other works for long. Four at most: these answer more requests than
/// the pods of a node may send (200 each second), and each thread more has memory of its own, which on a node of 96
/// processors would be most of the agent's.
fn runtime() -> io::Result<Runtime> {
    let processors = thread::available_parallelism().map_or(2, NonZero::get);
    Builder::new_multi_thread()
        .worker_threads(processors.clamp(2, 4))
        .event_interval(serve::EVENT_INTERVAL)
        .enable_all()
        .build()
}

/// Starts everything; returns once this agent is the node's.
async fn start(config: Config, log_level: LogLevel) -> Result<App, Error> {
    let prepared = Prepared::new(config, log_level).await?;
    let bound = prepared.bind().await?;
    let attached = bound.attach().await?;
    let serving = attached.serve().await?;
    let guarded = serving.guard().await?;
    guarded.take_over().await
}

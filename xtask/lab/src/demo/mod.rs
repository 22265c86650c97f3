//! `cargo xtask demo`: the real agent on a lab node, shown by what its pods get. Every line is checked before it is shown.

mod by_hand;
mod lives;
mod rootless;
mod script;
mod transcript;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};

use script::Script;

/// What to show.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The agent's binary. Default: the one that was just built.
    #[arg(long)]
    pub agent: Option<PathBuf>,
    /// Keep the node up until Enter or Ctrl-C, and print commands to try by hand.
    #[arg(long, conflicts_with = "rootless")]
    pub keep: bool,
    /// Show what needs neither root nor BPF: the agent on loopback, which identifies pods by source address.
    #[arg(long)]
    pub rootless: bool,
}

/// Shows the agent at work, and ends with a verdict. Ctrl-C ends it early and takes everything away.
pub async fn run(options: Options) -> Result<()> {
    if !options.rootless
        && let Err(reason) = crate::available()
    {
        bail!(
            "the demo makes network namespaces and cgroups, which this machine refuses: {reason}; \
             `cargo xtask demo --rootless` shows what needs neither"
        );
    }
    let agent = options.agent.map_or_else(crate::agent_binary, Ok)?;
    let agent = agent
        .canonicalize()
        .with_context(|| format!("no agent at {}: cargo build -p kiam-agent", agent.display()))?;
    if options.rootless {
        let played = tokio::task::spawn_blocking(move || rootless::run(agent));
        return played.await.context("the demo's thread")?;
    }
    // With a handler the signal does not end the process, so that Drop takes the node away.
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            flag.store(true, Ordering::Relaxed);
        }
    });
    let played = tokio::task::spawn_blocking(move || {
        let mut script = Script::start(agent, Arc::clone(&interrupted))?;
        script.play()?;
        if options.keep {
            by_hand::wait(&script, &interrupted)?;
        }
        script.verdict()
    });
    played.await.context("the demo's thread")?
}

//! `cargo xtask bench`: what the agent costs, beside what else could be there.

mod agent;
mod document;
mod machine;
mod path;
mod programs;
mod restart;
mod rules;
mod statistics;
mod way;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use xtask::{
    build,
    command::{command, output_of, run as run_command, say, workspace},
    toolchain,
};

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// Requests beside a bare server's, memory, CPU of changes, crowds of pods, an idle node; as root, with wrk. A run of
    /// the default size takes about ten minutes on two cores, builds not counted.
    Agent(agent::Options),
    /// The ways from a pod to the agent, beside DNAT; as root on Debian it installs iptables and nftables. A run of the
    /// default size takes less than six minutes on two cores, builds not counted.
    Path(path::Options),
    /// How soon an agent serves after a kill, and in a takeover. A run of the default size takes about two minutes, builds
    /// not counted.
    Restart(restart::Options),
    /// What each kernel program takes for whoever has nothing to do with the agent. A run of the default size takes less
    /// than a minute, builds not counted.
    Programs(programs::Options),
}

/// The agent that is measured, and the machine before that.
struct Subject {
    binary: PathBuf,
    version: String,
    load_before: String,
}

/// Measures it, and writes down what was found.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Agent(options) => agent::run(options),
        Bench::Path(options) => path::run(options),
        Bench::Restart(options) => restart::run(options),
        Bench::Programs(options) => programs::run(options),
    }
}

/// Ends a measurement that needs a node, on a machine that can't make one.
fn require_node() -> Result<()> {
    toolchain::ensure_iproute()?;
    if let Err(reason) = lab::available() {
        bail!(
            "nothing was measured, because this machine refuses network namespaces or cgroups: {reason}"
        );
    }
    Ok(())
}

// === impl Subject ===

impl Subject {
    /// [`release_agent`], on a machine that can make nodes.
    fn prepare(built: Option<&Path>) -> Result<Self> {
        require_node()?;
        let binary = release_agent(built)?;
        let version = output_of(command(&binary).arg("--version"))
            .context("asking the agent for its version")?;
        Ok(Self { binary, version: version.trim().to_owned(), load_before: machine::load() })
    }
}

/// `built`, or the agent as it is released, built by itself: with other members it would share their features.
fn release_agent(built: Option<&Path>) -> Result<PathBuf> {
    if let Some(built) = built {
        return Ok(workspace().join(built));
    }
    build::ebpf()?;
    run_command(command("cargo").args(["build", "--release", "--package", "kiam-agent"]))?;
    Ok(workspace().join("target/release/kiam-agent"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    say(format!("written: {}", path.display()));
    Ok(())
}

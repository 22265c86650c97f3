//! `cargo xtask bench`: what the agent costs, beside what else could be there.

mod document;
mod machine;
mod path;
mod rules;
mod statistics;
mod way;

use anyhow::Result;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// The ways from a pod to the agent, beside DNAT; as root on Debian it installs iptables and nftables. A run of the
    /// default size takes less than six minutes on two cores, builds not counted.
    Path(path::Options),
}

/// Measures it, and writes down what was found.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Path(options) => path::run(options),
    }
}

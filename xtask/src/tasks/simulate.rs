//! `cargo xtask simulate`: what a whole fleet of agents does, in virtual time.

use anyhow::Result;

use xtask::command::{command, run};

/// What to simulate.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Simulation {
    /// What 5,000 nodes ask of STS and of the Kubernetes API; writes `docs/scale.md` in about ten minutes.
    #[command(disable_help_flag = true)]
    Scale {
        /// Options of the simulation; `--help` shows them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

/// Simulates it.
pub(crate) fn start(simulation: &Simulation) -> Result<()> {
    let Simulation::Scale { options } = simulation;
    run(command("cargo").args(["run", "--package", "kiam-simulation", "--"]).args(options))
}

//! The project's own commands: `cargo xtask <command>`.

#![forbid(unsafe_code)]

mod tasks;

use std::process::ExitCode;

use clap::Parser;

/// Builds, checks and shows kiam-ebpf.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Builds the kernel program into `kiam-ebpf/out/kiam.bpf.o`; as root on Debian it installs what it needs for that.
    BuildEbpf,
    /// Builds the agent and shows it at work on a node made of namespaces, as root; or with `--rootless` on loopback.
    #[command(disable_help_flag = true)]
    Demo {
        /// Options of the demo; `--help` shows them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Builds the container image, without a container engine: an OCI layout, archives for `docker load`, and an SBOM.
    Image(tasks::image::Options),
    /// Runs all the tests, or those of the named parts.
    Test(tasks::test::Selection),
    /// Checks the rules of this repository that no compiler checks.
    Tidy,
    /// Measures the agent beside what else could be there, and writes what it found; needs root.
    #[command(disable_help_flag = true)]
    Bench {
        /// What to measure, and how; `--help` shows it.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Simulates a fleet of agents, and writes what it asks of STS and of the Kubernetes API.
    #[command(subcommand)]
    Simulate(tasks::simulate::Simulation),
    /// What runs as process 1 of a guest with another kernel.
    #[command(hide = true)]
    InGuest,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::BuildEbpf => xtask::build::ebpf(),
        Command::Demo { options } => tasks::lab::demo(&options),
        Command::Image(options) => tasks::image::build(&options),
        Command::Test(selection) => tasks::test::run_steps(&selection),
        Command::Tidy => tasks::tidy::run(),
        Command::Bench { options } => tasks::lab::bench(&options),
        Command::Simulate(simulation) => tasks::simulate::start(&simulation),
        Command::InGuest => tasks::kernels::init(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

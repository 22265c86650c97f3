//! The project's own commands: `cargo xtask <command>`.

#![forbid(unsafe_code)]

mod tasks;

use std::process::ExitCode;

use clap::Parser;

/// Builds, checks and shows kiam-ebpf.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Builds the kernel object, `kiam-ebpf/out/kiam.bpf.o`. As root on Debian it installs the packages that this needs.
    BuildEbpf,
    /// Builds the agent and shows it at work: as root on a node made of namespaces, or with `--rootless` on loopback.
    #[command(disable_help_flag = true)]
    Demo {
        /// Options of the demo; `--help` shows them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Builds the container image, without a container engine: an OCI layout, archives for `docker load`, and an SBOM.
    Image(tasks::image::Options),
    /// Runs all tests, or those of the named parts.
    Test(tasks::test::Selection),
    /// Checks the repository's own rules, which no compiler checks.
    Tidy,
    /// Builds the documents as a book, `target/book/index.html`. The first time it installs mdBook, which takes minutes.
    Book,
    /// Measures the agent, and writes the results to `docs/benchmarks.md` and `docs/restarts.md`. Needs root.
    #[command(disable_help_flag = true)]
    Bench {
        /// Options of the benchmark; `--help` shows them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Simulates a fleet of agents, and writes its calls to STS and the Kubernetes API to `docs/scale.md`.
    #[command(subcommand)]
    Simulate(tasks::simulate::Simulation),
    /// Runs as process 1 of a guest with another kernel.
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
        Command::Book => tasks::book::build(),
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

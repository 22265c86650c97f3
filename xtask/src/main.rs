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
    /// Builds everything and shows the agent at work on a node made of namespaces; needs root.
    Demo(xtask::demo::Options),
    /// Runs all the tests, or those of the named parts.
    Test(tasks::test::Selection),
    /// Checks the rules of this repository that no compiler checks.
    Tidy,
    /// Measures the agent beside what else could be there, and writes what it found; needs root.
    #[command(subcommand)]
    Bench(tasks::bench::Bench),
    /// Simulates a fleet of agents, and writes what it asks of STS and of the Kubernetes API.
    #[command(subcommand)]
    Simulate(tasks::simulate::Simulation),
    /// What runs inside the lab's pods.
    #[command(hide = true)]
    InPod(xtask::pod_client::Options),
    /// What runs inside the lab's hostile pods.
    #[command(hide = true)]
    InPodAttack,
    /// What runs inside the lab's pods that others attack.
    #[command(hide = true)]
    InPodVictim {
        /// A [`xtask::pod_client::victim::Pace`] as JSON.
        pace: String,
    },
    /// What runs inside the lab's pods that attack others.
    #[command(hide = true)]
    InPodHostile {
        /// A [`xtask::pod_client::hostile::Program`] as JSON.
        program: String,
    },
    /// What runs as process 1 of a guest with another kernel.
    #[command(hide = true)]
    InGuest,
    /// What runs inside the lab's pods to be timed.
    #[command(hide = true)]
    InPodBench(xtask::pod_client::bench::Options),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::BuildEbpf => tasks::build::ebpf(),
        Command::Demo(options) => tasks::demo::run(options),
        Command::Test(selection) => tasks::test::run_steps(&selection),
        Command::Tidy => tasks::tidy::run(),
        Command::Bench(bench) => tasks::bench::run(&bench),
        Command::Simulate(simulation) => tasks::simulate::start(&simulation),
        Command::InGuest => tasks::kernels::init(),
        Command::InPod(options) => xtask::pod_client::main(&options),
        Command::InPodAttack => xtask::pod_client::attack::main(),
        Command::InPodVictim { pace } => xtask::pod_client::victim::main(&pace),
        Command::InPodHostile { program } => xtask::pod_client::hostile::main(&program),
        Command::InPodBench(options) => xtask::pod_client::bench::main(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! The project's own commands: `cargo xtask <command>`.

mod tasks;

use std::process::ExitCode;

use clap::Parser;

/// Builds, checks and shows kiam-ebpf.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Builds the kernel program into `kiam-ebpf/out/kiam.bpf.o`; as root on Debian it installs what it needs for that.
    BuildEbpf,
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::BuildEbpf => tasks::build_ebpf::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

//! The `kubectl-kiam` command, which kubectl runs as `kubectl kiam`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    kiam_agent::ctl::main("kubectl kiam", &arguments)
}

//! The `kiam-agent` command.

use std::process::ExitCode;

use kiam_agent::{
    admin, app,
    config::{self, ProcessVars, Task},
    intercept,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match config::parse(&arguments, &ProcessVars) {
        Err(mistakes) => {
            eprintln!("{mistakes}\nkiam-agent --help shows every flag");
            ExitCode::from(config::USAGE)
        }
        Ok(Task::Print(text)) => {
            println!("{}", text.trim_end());
            ExitCode::SUCCESS
        }
        Ok(Task::Uninstall { bpffs, force: true }) => uninstall(&bpffs),
        Ok(Task::Uninstall { bpffs, force: false }) => match intercept::unused(&bpffs) {
            Ok(Some(_unused)) => uninstall(&bpffs),
            Ok(None) => {
                eprintln!(
                    "kiam-agent: an agent runs on this node, with pins below {}: end it first, or give --force",
                    bpffs.display()
                );
                ExitCode::FAILURE
            }
            Err(error) => failed(&error),
        },
        Ok(Task::Status { live: true, state_dir }) => ask(&state_dir, "/live"),
        Ok(Task::Status { live: false, state_dir }) => ask(&state_dir, "/ready"),
        Ok(Task::Explain { pod, state_dir }) => ask(&state_dir, &format!("/explain/{pod}")),
        Ok(Task::ProofClient) => match intercept::proof_client() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Ok(Task::Run(config)) => app::main(*config),
    }
}

fn uninstall(bpffs: &std::path::Path) -> ExitCode {
    match intercept::uninstall(bpffs) {
        Ok(removed) if removed.is_empty() => {
            println!("nothing is installed below {}", bpffs.display());
            ExitCode::SUCCESS
        }
        Ok(removed) => {
            for what in removed {
                println!("removed {what}");
            }
            println!("pods reach the node's metadata service directly now");
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error),
    }
}

/// Prints what the agent that runs says; whether that is good, its status says.
fn ask(state_dir: &std::path::Path, path: &str) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error),
    };
    match runtime.block_on(admin::get(state_dir, path)) {
        Ok((status, body)) => {
            print!("{body}");
            if status.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("kiam-agent: {error}");
    ExitCode::FAILURE
}

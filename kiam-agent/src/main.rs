//! The `kiam-agent` command.

#![forbid(unsafe_code)]

use std::{error::Error, io::Write as _, process::ExitCode};

use kiam_agent::{
    admin, app, config, config::Task, ctl, migrate, preflight::preflight, uninstall::uninstall,
};
use kiam_core::telemetry::Chain;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match config::parse(&arguments, &config::ProcessVars) {
        Ok(task) => run(task).unwrap_or_else(|error| {
            eprintln!("kiam-agent: {}", Chain(&*error));
            ExitCode::FAILURE
        }),
        Err(mistakes) => {
            eprintln!("{mistakes}\nkiam-agent --help shows every flag");
            ExitCode::from(config::USAGE)
        }
    }
}

/// Prints `text`. A reader that has closed the pipe, such as head, needs no more of it.
fn print(text: &str) {
    drop(writeln!(std::io::stdout(), "{}", text.trim_end()));
}

fn run(task: Task) -> Result<ExitCode, Box<dyn Error>> {
    match task {
        Task::Run(config) => return Ok(app::main(*config)),
        Task::Preflight(task) => return Ok(preflight(*task)?),
        Task::Status { form, state_dir } => return Ok(admin::status(&state_dir, form)?),
        Task::Explain { pod, output, state_dir } => {
            return Ok(admin::explain(&state_dir, &pod, output)?);
        }
        Task::Pods { state_dir } => return Ok(admin::pods(&state_dir)?),
        Task::Ctl(arguments) => return Ok(ctl::main("kiam-agent ctl", &arguments)),
        Task::Refresh { pod, state_dir } => return Ok(admin::refresh(&state_dir, &pod)?),
        Task::Uninstall { bpffs, state_dir, boot_guard, force } => {
            uninstall(&bpffs, &state_dir, boot_guard.as_deref(), force)?;
        }
        Task::Migrate(options) => {
            let migration = migrate::migrate(&options, &config::mistakes)?;
            print(&migration.text);
            if migration.decisions > 0 {
                return Ok(ExitCode::from(migrate::DECISIONS));
            }
        }
        Task::Print(text) => print(&text),
        Task::SelftestClient => kiam_kernel::selftest::client()?,
        Task::Pause => loop {
            std::thread::park();
        },
    }
    Ok(ExitCode::SUCCESS)
}

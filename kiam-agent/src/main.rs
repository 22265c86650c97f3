//! The `kiam-agent` command.

#![forbid(unsafe_code)]

use std::{
    fs,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use kiam_agent::{
    admin, app,
    config::{self, ProcessVars, Task},
};
use kiam_core::telemetry::Chain;
use kiam_kernel::{guard, intercept, pins, selftest};

/// An agent shows every second that it lives; one that has not for so long hangs.
const HANGS: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match config::parse(&arguments, &ProcessVars) {
        Err(mistakes) => {
            eprintln!("{mistakes}\nkiam-agent --help shows every flag");
            ExitCode::from(config::USAGE)
        }
        Ok(Task::Print(text)) => {
            // Who reads on no longer, such as head, has what it wants.
            let _ = writeln!(io::stdout(), "{}", text.trim_end());
            ExitCode::SUCCESS
        }
        Ok(Task::Uninstall { bpffs, state_dir, boot_guard, force }) => {
            match uninstall(&bpffs, &state_dir, boot_guard.as_deref(), force) {
                Ok(code) => code,
                Err(error) => failed(&error),
            }
        }
        Ok(Task::Status { live: true, state_dir }) => ask(admin::get(&state_dir, "/live")),
        Ok(Task::Status { live: false, state_dir }) => ask(admin::get(&state_dir, "/ready")),
        Ok(Task::Explain { pod, state_dir }) => {
            ask(admin::get(&state_dir, &format!("/explain/{pod}")))
        }
        Ok(Task::Refresh { pod, state_dir }) => {
            ask(admin::post(&state_dir, &format!("/refresh/{pod}")))
        }
        Ok(Task::SelftestClient) => match selftest::client() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Ok(Task::Run(config)) => app::main(*config),
    }
}

fn uninstall(
    bpffs: &Path,
    state_dir: &Path,
    boot_guard: Option<&Path>,
    force: bool,
) -> Result<ExitCode, intercept::Error> {
    // Held to the end, so that no agent starts meanwhile.
    let lock = pins::lock_for_uninstall(bpffs)?;
    if lock.is_none()
        && let Some(refusal) = refusal(bpffs, state_dir, force)
    {
        eprintln!("kiam-agent: {refusal}");
        return Ok(ExitCode::FAILURE);
    }
    intercept::detach(bpffs)?;
    // Before the rules that it sets: a boot meanwhile would bring them back.
    let mut removed = boot_guard
        .map(guard::remove_boot_guard)
        .transpose()
        .map_err(intercept::Error::from)?
        .unwrap_or_default();
    removed.extend(intercept::uninstall(bpffs)?);
    // The lock on the folder shows others an agent that hangs; others' pins keep it too, and so does a mount.
    if lock.is_some() && fs::remove_dir(bpffs).is_ok() {
        removed.push(bpffs.display().to_string());
    }
    let left = app::remove_state(state_dir, lock.is_some());
    let left =
        left.map_err(|(path, source)| intercept::Error::File { what: "remove", path, source });
    removed.extend(left?.iter().map(|path| path.display().to_string()));
    for what in &removed {
        println!("removed {what}");
    }
    match removed.is_empty() {
        true => println!("nothing is installed below {}", bpffs.display()),
        false => println!("pods reach the node's metadata service directly now"),
    }
    if lock.is_none() {
        println!(
            "an agent that hangs, or starts, is still there, and puts everything back if it goes on: end it"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Why not, where an agent has the pins in use.
fn refusal(bpffs: &Path, state_dir: &Path, force: bool) -> Option<String> {
    let shown = bpffs.display();
    if !force && is_ending(state_dir) {
        return Some(format!(
            "an agent on this node, with pins below {shown}, was asked to end and serves until another takes over, or its --grace-period ends: try again then, or end it at once by a second SIGTERM"
        ));
    }
    if !force {
        return Some(format!(
            "an agent runs on this node, with pins below {shown}: end it first, or give --force if it hangs"
        ));
    }
    let age = intercept::last_renewed(bpffs).filter(|age| *age < HANGS)?;
    Some(format!(
        "an agent runs on this node, with pins below {shown}, and showed {} ms ago that it lives: it would put everything back at once; end it first (--force is for one that has hung for {} s)",
        age.as_millis(),
        HANGS.as_secs()
    ))
}

/// Whether the agent that runs waits for a successor, as far as it can be asked.
fn is_ending(state_dir: &Path) -> bool {
    wait_for(admin::get(state_dir, "/ready")).is_ok_and(|(_, body)| body.contains(app::ENDING))
}

/// Prints what the agent that runs says; whether that is good, its status says.
fn ask(
    answer: impl Future<Output = Result<(http::StatusCode, String), admin::StatusError>>,
) -> ExitCode {
    match wait_for(answer) {
        Ok((good, body)) => {
            print!("{body}");
            if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => failed(&*error),
    }
}

/// What the agent that runs says, and whether that is good.
fn wait_for(
    answer: impl Future<Output = Result<(http::StatusCode, String), admin::StatusError>>,
) -> Result<(bool, String), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, body) = runtime.block_on(answer)?;
    Ok((status.is_success(), body))
}

fn failed(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("kiam-agent: {}", Chain(error));
    ExitCode::FAILURE
}

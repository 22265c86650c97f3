//! `kiam-agent status`, `explain` and `refresh`: print what the agent that runs answers.

use std::{fmt::Display, path::Path, process::ExitCode};

use http::StatusCode;

use super::{StatusError, get, post};

/// Prints whether the agent whose state is in `state_dir` is ready, or only whether it is `live`.
///
/// # Errors
///
/// [`StatusError`].
pub fn status(state_dir: &Path, live: bool) -> Result<ExitCode, StatusError> {
    print(get(state_dir, if live { "/live" } else { "/ready" }))
}

/// Prints why `pod` gets what it gets.
///
/// # Errors
///
/// [`StatusError`].
pub fn explain(state_dir: &Path, pod: &impl Display) -> Result<ExitCode, StatusError> {
    print(get(state_dir, &format!("/explain/{pod}")))
}

/// Refreshes the credentials of `pod`, and prints the outcome.
///
/// # Errors
///
/// [`StatusError`].
pub fn refresh(state_dir: &Path, pod: &impl Display) -> Result<ExitCode, StatusError> {
    print(post(state_dir, &format!("/refresh/{pod}")))
}

/// Waits for `answer`, and returns its body, and whether its status is good.
///
/// # Errors
///
/// [`StatusError`].
pub fn wait_for(
    answer: impl Future<Output = Result<(StatusCode, String), StatusError>>,
) -> Result<(bool, String), StatusError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (status, body) = runtime.map_err(StatusError::Runtime)?.block_on(answer)?;
    Ok((status.is_success(), body))
}

/// Prints `answer`; the exit code says whether its status is good.
fn print(
    answer: impl Future<Output = Result<(StatusCode, String), StatusError>>,
) -> Result<ExitCode, StatusError> {
    let (good, body) = wait_for(answer)?;
    print!("{body}");
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

//! `kiam-agent status`, `explain`, `pods` and `refresh`: print what the agent that runs answers.

use std::{
    fmt::Display,
    io::{self, Write as _},
    path::Path,
    process::ExitCode,
};

use http::StatusCode;

use super::{NodeStatus, StatusError, get, post, routes::JSON};

/// How something is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Aligned lines for people.
    Text,
    /// One JSON object.
    Json,
}

/// What `kiam-agent status` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusForm {
    /// Only whether the agent is alive, for a probe.
    Live,
    /// Only whether the agent is ready, and what is pending, for a probe.
    Ready,
    /// The page.
    Page(Output),
}

/// Prints the state of the agent whose own state is in `state_dir`; the exit code says whether it is ready, or alive.
///
/// # Errors
///
/// [`StatusError`].
pub fn status(state_dir: &Path, form: StatusForm) -> Result<ExitCode, StatusError> {
    let output = match form {
        StatusForm::Live => return print(get(state_dir, "/live")),
        StatusForm::Ready => return print(get(state_dir, "/ready")),
        StatusForm::Page(output) => output,
    };
    let (good, body) = wait_for(get(state_dir, "/status"))?;
    let Some(status) = good.then(|| serde_json::from_str::<NodeStatus>(&body).ok()).flatten()
    else {
        // An agent of an earlier version, asked by a later one's program.
        return print(get(state_dir, "/ready"));
    };
    match output {
        Output::Text => say(&status.text()),
        Output::Json => say(&body),
    }
    Ok(exit_code(status.ready))
}

/// Prints why `pod` gets what it gets.
///
/// # Errors
///
/// [`StatusError`].
pub fn explain(
    state_dir: &Path,
    pod: &impl Display,
    output: Output,
) -> Result<ExitCode, StatusError> {
    let query = match output {
        Output::Text => String::new(),
        Output::Json => format!("?{JSON}"),
    };
    print(get(state_dir, &format!("/explain/{pod}{query}")))
}

/// Prints what is known of each pod, as JSON.
///
/// # Errors
///
/// [`StatusError`].
pub fn pods(state_dir: &Path) -> Result<ExitCode, StatusError> {
    print(get(state_dir, "/pods"))
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
    say(&body);
    Ok(exit_code(good))
}

/// A reader that has closed the pipe needs no more of it.
fn say(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

fn exit_code(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

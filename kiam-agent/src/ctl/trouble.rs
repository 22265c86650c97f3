//! Why a node's agent gives no answer, or not the usual one, and what to do about that.

use std::{fmt, time::Duration};

use serde::Serialize;

use super::table::Tone;
use crate::cluster::{FailureKind, RequestFailure};

/// The state of a node's agent, as far as it was found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    /// It is ready.
    Ok,
    /// It runs, and a condition does not hold.
    NotReady,
    /// The node has no pod of it.
    NoAgent,
    /// Its pod has not started.
    Starting,
    /// Its container ends again and again.
    Crashing,
    /// The caller may not run commands in its pod.
    Forbidden,
    /// It did not answer in time.
    NoAnswer,
    /// Its pod can't be reached.
    Unreachable,
    /// It is of a version that has no such command.
    Old,
    /// The command failed.
    Failed,
}

/// Why there is no answer of a node's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Trouble {
    pub(super) state: State,
    /// What is wrong.
    pub(super) cause: String,
    /// What to do about it.
    pub(super) remedy: String,
}

// === impl State ===

impl State {
    pub(super) fn tone(self) -> Tone {
        match self {
            Self::Ok => Tone::Good,
            Self::Starting | Self::Old => Tone::Warn,
            _ => Tone::Bad,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::NotReady => "not ready",
            Self::NoAgent => "no agent",
            Self::Starting => "starting",
            Self::Crashing => "crashing",
            Self::Forbidden => "forbidden",
            Self::NoAnswer => "no answer",
            Self::Unreachable => "unreachable",
            Self::Old => "old",
            Self::Failed => "failed",
        })
    }
}

// === impl Trouble ===

impl Trouble {
    pub(super) fn new(state: State, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state, cause: cause.into(), remedy: remedy.into() }
    }

    /// The agent of `pod` did not answer.
    pub(super) fn late(limit: Duration, pod: &str) -> Self {
        let cause = format!("{pod} did not answer within {}", humantime::format_duration(limit));
        let remedy = "the node may be overloaded, or its kubelet hang: try a longer --timeout, and see `kubectl describe node`";
        Self::new(State::NoAnswer, cause, remedy)
    }

    /// A command could not be run in `pod` of `namespace`.
    pub(super) fn of_exec(failure: &RequestFailure, namespace: &str, pod: &str) -> Self {
        let RequestFailure { kind, message } = failure;
        match kind {
            FailureKind::Forbidden => Self::new(
                State::Forbidden,
                message.clone(),
                format!(
                    "whoever asks needs get and create of pods/exec in namespace {namespace}: docs/kubectl-kiam.md"
                ),
            ),
            FailureKind::NotFound => Self::new(
                State::NoAgent,
                format!("the agent's pod {pod} is gone: {message}"),
                "ask again: another pod may have replaced it",
            ),
            FailureKind::Other => Self::new(
                State::Unreachable,
                format!("no command can be run in {pod}: {message}"),
                "see whether the node is Ready, and whether the API server reaches its kubelet (port 10250)",
            ),
        }
    }
}

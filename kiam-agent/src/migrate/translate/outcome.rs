//! What becomes of a flag or a variable.

use std::fmt;

use crate::peers::Program;

/// What becomes of it, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Outcome {
    Kept,
    Renamed,
    Unneeded,
    /// Somebody must decide.
    NoEqual,
}

/// What becomes of it, and why.
pub(super) struct Verdict {
    outcome: Outcome,
    detail: String,
}

/// A line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Line {
    /// Whose it is; `None` of the agent's own flags.
    pub(in super::super) program: Option<Program>,
    /// As the manifest has it.
    pub(in super::super) written: String,
    pub(in super::super) outcome: Outcome,
    pub(in super::super) detail: String,
}

// === impl Outcome ===

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Kept => "kept",
            Self::Renamed => "renamed",
            Self::Unneeded => "not needed",
            Self::NoEqual => "no equal",
        })
    }
}

// === impl Verdict ===

impl Verdict {
    pub(super) fn kept() -> Self {
        Self::new(Outcome::Kept, "")
    }

    pub(super) fn kept_as(detail: impl Into<String>) -> Self {
        Self::new(Outcome::Kept, detail)
    }

    pub(super) fn renamed(detail: impl Into<String>) -> Self {
        Self::new(Outcome::Renamed, detail)
    }

    pub(super) fn unneeded(detail: impl Into<String>) -> Self {
        Self::new(Outcome::Unneeded, detail)
    }

    pub(super) fn no_equal(detail: impl Into<String>) -> Self {
        Self::new(Outcome::NoEqual, detail)
    }

    fn new(outcome: Outcome, detail: impl Into<String>) -> Self {
        Self { outcome, detail: detail.into() }
    }

    pub(super) fn line(self, program: Program, written: &str) -> Line {
        self.of(Some(program), written)
    }

    pub(super) fn line_of_ours(self, written: &str) -> Line {
        self.of(None, written)
    }

    fn of(self, program: Option<Program>, written: &str) -> Line {
        let Self { outcome, detail } = self;
        Line { program, written: written.to_owned(), outcome, detail }
    }
}

//! What may come of an attempt, by what it is and by the state of the agent.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use lab::{
    Lab,
    fake::imds::NODE_ACCESS_KEY,
    pod_client::{Attempt, attack::SQUATTER_ACCESS_KEY},
    role_arn,
};

/// The agent's life, in the order it is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    /// Before its first start. Nothing is closed: here an attempt must arrive, or it would prove nothing later.
    NoAgent,
    Running,
    /// Stopped (SIGSTOP), its lease still good.
    Hung,
    /// Stopped, its lease over.
    HungLapsed,
    /// One agent after the other starts beside the one that runs.
    Takeover,
    /// `kill -9`.
    Killed,
    /// Uninstalled and started again.
    Reinstalled,
}

/// What must come of an attempt. No packet may arrive in any case, but for [`Expect::Node`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expect {
    /// Redirected: its own credentials while the agent works, no answer while it hangs, else refused at once.
    Served,
    /// The same of a pod whose network namespace a hung agent can't know: it is denied.
    Known,
    /// Redirected, and rejected by the agent.
    Rejected,
    /// Nothing but its own credentials, if any.
    NothingStrange,
    /// One of these errors, always.
    Refused(&'static [&'static str]),
    /// No answer, whatever the sender sees.
    Nothing,
    /// It is the node itself, whose credentials it always gets.
    Node,
}

/// What the caller was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Credentials of its own role.
    Own,
    /// The node's.
    Node,
    /// Somebody else's.
    Strange(String),
    /// Another answer.
    Status(u16),
    /// An error.
    Error(String),
    /// It could send, and got no answer.
    Sent,
}

/// What came of one attempt.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) answer: Answer,
    pub(crate) packets: BTreeMap<IpAddr, u64>,
}

/// What is to be thought of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Right,
    /// Documented as open.
    Open,
    Wrong,
}

// === impl State ===

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NoAgent => "no agent",
            Self::Running => "running",
            Self::Hung => "hung",
            Self::HungLapsed => "hung >10s",
            Self::Takeover => "takeover",
            Self::Killed => "killed",
            Self::Reinstalled => "re-installed",
        }
    }

    /// Whether the agent answers.
    pub(crate) fn serves(self) -> bool {
        matches!(self, Self::Running | Self::Takeover | Self::Reinstalled)
    }
}

// === impl Answer ===

impl Answer {
    /// Of an attempt by a pod whose role is `role`.
    pub(crate) fn of(attempt: &Attempt, lab: &Lab, role: &str) -> Self {
        if let Some(error) = &attempt.error {
            return Self::Error(error.clone());
        }
        match (attempt.status, attempt.field("AccessKeyId")) {
            (Some(200), Some(key)) if key == NODE_ACCESS_KEY => Self::Node,
            (Some(200), Some(key)) if key == SQUATTER_ACCESS_KEY => {
                Self::Strange("squatter's".to_owned())
            }
            (Some(200), _) => match lab.role_of(attempt) {
                Some(issued) if issued == role_arn(role) => Self::Own,
                issued => Self::Strange(issued.unwrap_or_else(|| attempt.body.clone())),
            },
            (Some(status), _) => Self::Status(status),
            (None, _) => Self::Sent,
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("own"),
            Self::Node => f.write_str("NODE'S"),
            Self::Strange(whose) => write!(f, "{}", whose.to_uppercase()),
            Self::Status(status) => write!(f, "{status}"),
            Self::Error(error) => f.write_str(error),
            Self::Sent => f.write_str("sent"),
        }
    }
}

// === impl Outcome ===

impl Outcome {
    /// What to think of it; `open`: nothing closes it, and the documents say so.
    pub(crate) fn judge(&self, expect: Expect, open: bool, state: State) -> Verdict {
        let closed = matches!(expect, Expect::Node) || self.packets.is_empty();
        match (closed && self.fits(expect, state), open) {
            (true, _) => Verdict::Right,
            (false, true) => Verdict::Open,
            (false, false) => Verdict::Wrong,
        }
    }

    fn fits(&self, expect: Expect, state: State) -> bool {
        let error = |known: &[&str]| match &self.answer {
            Answer::Error(error) => known.contains(&error.as_str()),
            _ => false,
        };
        let redirected = |answer| match state {
            State::Hung => error(&["ETIMEDOUT"]),
            State::HungLapsed => error(&["EPERM"]),
            // Nobody listens, or the lease is over.
            State::Killed => error(&["ECONNREFUSED", "EPERM"]),
            _ => self.answer == answer,
        };
        match expect {
            Expect::Served => redirected(Answer::Own),
            Expect::Known if state == State::Hung => error(&["EPERM"]),
            Expect::Known => redirected(Answer::Own),
            Expect::Rejected => redirected(Answer::Status(403)),
            Expect::NothingStrange => !matches!(self.answer, Answer::Node | Answer::Strange(_)),
            Expect::Refused(known) => error(known),
            Expect::Nothing => matches!(self.answer, Answer::Error(_) | Answer::Sent),
            Expect::Node => self.answer == Answer::Node && !self.packets.is_empty(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.answer.fmt(f)?;
        match self.packets.values().sum() {
            0_u64 => Ok(()),
            count => write!(f, " +{count}"),
        }
    }
}

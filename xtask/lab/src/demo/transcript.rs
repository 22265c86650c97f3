//! Plain, aligned text in which every line is a claim with its check. At most 100 columns.

use std::{fmt::Display, io::IsTerminal, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;

use crate::{pod_client::Attempt, role_arn};

const GREEN: &str = "\x1b[32m";
const RED: &str = "\x1b[1;31m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";
/// What a line has before its mark.
const WIDTH: usize = 92;

/// What was claimed so far.
#[derive(Debug)]
pub(super) struct Transcript {
    coloured: bool,
    sections: u32,
    held: u32,
    broken: Vec<String>,
}

/// What is read of an answer with credentials.
pub(super) struct Given {
    pub(super) role: String,
    pub(super) access_key: String,
    pub(super) expires_in: String,
}

// === impl Transcript ===

impl Transcript {
    pub(super) fn new() -> Self {
        Self { coloured: std::io::stdout().is_terminal(), sections: 0, held: 0, broken: Vec::new() }
    }

    /// Says something that needs no check.
    pub(super) fn say(&self, text: impl Display) {
        println!("   {text}");
    }

    /// Begins a numbered section.
    pub(super) fn section(&mut self, title: &str) {
        self.sections += 1;
        println!("\n{}", self.paint(BOLD, &format!("{}. {title}", self.sections)));
    }

    /// Shows `line` with its mark: whether `checks` all hold. Those that don't are named below it.
    pub(super) fn claim(&mut self, line: impl Display, checks: &[(&str, bool)]) {
        let line = line.to_string();
        let broken: Vec<&str> =
            checks.iter().filter(|check| !check.1).map(|check| check.0).collect();
        let mark =
            if broken.is_empty() { self.paint(GREEN, "ok") } else { self.paint(RED, "FALSE") };
        println!("   {line:<WIDTH$}{mark}");
        for check in broken {
            println!("      {}", self.paint(RED, &format!("not so: {check}")));
            let line: Vec<&str> = line.split_whitespace().collect();
            self.broken.push(format!("{}. {}: not so: {check}", self.sections, line.join(" ")));
        }
        self.held += u32::try_from(checks.iter().filter(|check| check.1).count()).unwrap_or(0);
    }

    /// Says which agent is shown.
    pub(super) fn agent(&self, binary: &Path) -> Result<()> {
        let version = Command::new(binary).arg("--version").output();
        let version = version.with_context(|| format!("running {}", binary.display()))?;
        self.say(format!("agent  {}", String::from_utf8_lossy(&version.stdout).trim()));
        self.say(format!("       {}", binary.display()));
        Ok(())
    }

    /// Shows what `pod` got. It is to have `role`, if any, and `owner` is the role that STS issued the key for.
    pub(super) fn answer(
        &mut self,
        pod: &str,
        attempt: &Attempt,
        role: Option<&str>,
        owner: Option<String>,
    ) {
        let Some(role) = role else {
            let reason = attempt.reason();
            let line = format!("{pod:<16}{:<8}{reason:.66}", show(attempt));
            return self.claim(
                line,
                &[
                    ("404", attempt.status == Some(404)),
                    ("the body is empty", attempt.body.is_empty()),
                    ("the reason is given", !reason.is_empty()),
                ],
            );
        };
        let Given { role: listed, access_key, expires_in } = Given::read(attempt);
        let (status, took) = (show(attempt), millis(Duration::from_micros(attempt.micros)));
        self.claim(
            format!("{pod:<16}{status:<8}{listed:<18}{access_key:<22}{expires_in:<12}{took}"),
            &[
                ("200", attempt.status == Some(200)),
                ("the role's name is the pod's", role.ends_with(&listed) && !listed.is_empty()),
                ("STS issued this key for the pod's role", owner == Some(role_arn(role))),
            ],
        );
    }

    /// Shows that `pod` asked for `what` and got nothing, but `expected`.
    pub(super) fn rejected(&mut self, pod: &str, what: &str, attempt: &Attempt, expected: &str) {
        let got = show(attempt);
        let check = format!("it is rejected with {expected}");
        self.claim(
            format!("{pod:<16}{got:<14}{what}"),
            &[(&check, got == expected), ("the body is empty", attempt.body.is_empty())],
        );
    }

    /// Says whether all checks held.
    pub(super) fn verdict(&self, log: impl FnOnce() -> String) -> Result<()> {
        if self.broken.is_empty() {
            println!("\nVerdict: all of it is true ({} checks).", self.held);
            return Ok(());
        }
        println!("\nThe agent's output:\n{}", log());
        bail!(
            "{} of {} checks do not hold:\n  {}",
            self.broken.len(),
            self.held as usize + self.broken.len(),
            self.broken.join("\n  ")
        )
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.coloured { format!("{colour}{text}{PLAIN}") } else { text.to_owned() }
    }
}

// === impl Given ===

impl Given {
    /// The columns of [`Transcript::answer`].
    pub(super) const HEAD: &str =
        "POD             STATUS  ROLE              ACCESS KEY            EXPIRES     TOOK";

    pub(super) fn read(attempt: &Attempt) -> Self {
        let field = |name: &str| attempt.field(name).unwrap_or_else(|| "-".to_owned());
        let expiration = field("Expiration").parse::<Timestamp>();
        let left = expiration.map(|at| at.duration_since(Timestamp::now()));
        Self {
            role: attempt.role.clone().unwrap_or_default(),
            access_key: field("AccessKeyId"),
            expires_in: match left {
                Ok(left) if left.as_mins() > 0 => format!("in {} min", left.as_mins()),
                Ok(left) => format!("in {} s", left.as_secs()),
                Err(_) => "-".to_owned(),
            },
        }
    }
}

/// The status, or the error in its place.
pub(super) fn show(attempt: &Attempt) -> String {
    match (&attempt.error, attempt.status) {
        (Some(error), _) => error.clone(),
        (None, Some(status)) => status.to_string(),
        (None, None) => "sent".to_owned(),
    }
}

pub(super) fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

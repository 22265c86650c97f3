//! The state of one node's agent, as `kiam-agent status` shows it: read when it is asked for, and without secrets.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::explain::{Explainer, PodCounts};
use kiam_core::{
    clock::Clock,
    credentials::{CredentialReader, State},
    lifecycle::Readiness,
    pods::PodReader,
    telemetry::{Warnings, plain_char, times},
};

/// The most failing roles that are shown: a pod's share must not fill the page.
const FAILING: usize = 20;
/// The most warnings that are shown.
const WARNINGS: usize = 8;
/// The detail of the self-test, and the latch.
const SELFTEST: &str = "self-test";
/// The latch that is set while the lease is renewed.
const LEASE: &str = "kernel programs attached";

/// The state of one node's agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct NodeStatus {
    pub version: String,
    /// `--node-name`.
    pub node: Option<String>,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// The conditions that do not hold.
    pub pending: Vec<String>,
    /// `enforce`, `observe` or `off`.
    pub interception: String,
    /// `--path`.
    pub path: String,
    /// `passed`, what failed, or nothing before the first.
    pub self_test: Option<String>,
    /// Whether the route guard holds, as tried from a pod.
    pub guard: Option<String>,
    /// Whether the lease is renewed, without which pods are denied; absent without interceptor.
    pub lease: Option<bool>,
    pub credentials: CredentialCounts,
    /// Seconds since each watch was last heard from; absent before the first time.
    pub watches: BTreeMap<String, Option<u64>>,
    pub pods: PodCounts,
    /// Other facts, by their names.
    pub details: BTreeMap<String, String>,
    /// The last warnings, the latest first.
    pub warnings: Vec<LoggedWarning>,
    /// The agent's own arguments.
    pub arguments: Vec<String>,
}

/// The credentials that pods want.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct CredentialCounts {
    pub ready: usize,
    pub pending: usize,
    pub failing: usize,
    pub oldest_seconds: Option<u64>,
    pub soonest_expiry_seconds: Option<u64>,
    /// Why some are pending.
    pub waiting: Vec<String>,
    /// Some of the failing roles.
    pub errors: Vec<FailingRole>,
}

/// A role that the node's pods want and do not get.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct FailingRole {
    pub role: String,
    pub error: String,
    pub retry_seconds: u64,
}

/// Equal warnings of the agent's log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct LoggedWarning {
    pub level: String,
    pub text: String,
    pub count: u64,
    pub seconds_ago: u64,
}

/// What a [`NodeStatus`] is read from.
pub struct StatusSources {
    /// The conditions and facts.
    pub readiness: Readiness,
    /// The accounts of pods.
    pub explainer: Explainer,
    /// Cached credentials.
    pub credentials: CredentialReader,
    /// Pods, and when each watch was last heard from.
    pub pods: PodReader,
    /// The log's warnings.
    pub warnings: Warnings,
    /// The wall clock.
    pub clock: Clock,
    /// When the agent started.
    pub started: Instant,
    /// What does not change while the agent runs.
    pub settings: StatusSettings,
}

/// The settings that a [`NodeStatus`] shows.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct StatusSettings {
    pub version: String,
    pub node: Option<String>,
    /// `enforce`, `observe` or `off`.
    pub interception: &'static str,
    /// `--path`.
    pub path: String,
    pub arguments: Vec<String>,
}

// === impl StatusSources ===

impl StatusSources {
    /// The state now.
    #[must_use]
    pub fn read(&self) -> NodeStatus {
        let StatusSettings { version, node, interception, path, arguments } = self.settings.clone();
        let owned = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect();
        let pending: Vec<String> = owned(self.readiness.pending());
        let details = self.readiness.details().into_iter();
        let mut details: BTreeMap<String, String> =
            details.map(|(name, text)| (name.to_owned(), text.into_owned())).collect();
        let intercepts = interception != "off";
        NodeStatus {
            version,
            node,
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: pending.is_empty(),
            interception: interception.to_owned(),
            path,
            self_test: details.remove(SELFTEST),
            guard: details.remove("guard route"),
            lease: intercepts.then(|| !pending.iter().any(|name| name == LEASE)),
            credentials: self.credentials(),
            watches: self.watches(),
            pods: self.explainer.counts(),
            details,
            warnings: self.warnings(),
            arguments,
            pending,
        }
    }

    fn credentials(&self) -> CredentialCounts {
        let (now, mut counts) = (self.clock.now(), CredentialCounts::default());
        let seconds = |later: SystemTime, earlier: SystemTime| {
            later.duration_since(earlier).unwrap_or_default().as_secs()
        };
        for (identity, state) in self.credentials.all() {
            match state {
                State::Ready(issued) => {
                    let issued = &issued.credentials;
                    counts.ready += 1;
                    let age = Some(seconds(now, issued.issued));
                    counts.oldest_seconds = counts.oldest_seconds.max(age);
                    let left = seconds(issued.expires, now);
                    let soonest = counts.soonest_expiry_seconds.unwrap_or(left);
                    counts.soonest_expiry_seconds = Some(soonest.min(left));
                }
                State::Pending(limit) => {
                    counts.pending += 1;
                    counts.waiting.extend(limit.map(|limit| limit.to_string()));
                }
                State::Failed { error, retry_at } => {
                    counts.failing += 1;
                    let left = retry_at.saturating_duration_since(Instant::now());
                    counts.errors.push(FailingRole {
                        role: identity.role.to_string(),
                        error: error.message.clone(),
                        retry_seconds: left.as_secs(),
                    });
                }
            }
        }
        counts.errors.sort();
        counts.errors.truncate(FAILING);
        counts.waiting.sort();
        counts.waiting.dedup();
        counts
    }

    /// Of kinds that are watched.
    fn watches(&self) -> BTreeMap<String, Option<u64>> {
        let silences = self.pods.silences().into_iter();
        let watched = silences.filter(|(kind, silence)| silence.is_some() || *kind == "pods");
        let seconds = |silence: Duration| silence.as_secs();
        watched.map(|(kind, silence)| (kind.to_owned(), silence.map(seconds))).collect()
    }

    fn warnings(&self) -> Vec<LoggedWarning> {
        let now = self.clock.now();
        let latest = self.warnings.latest(WARNINGS).into_iter();
        let shown = latest.map(|warning| LoggedWarning {
            level: if warning.is_error { "error" } else { "warn" }.to_owned(),
            text: warning.text,
            count: warning.count,
            seconds_ago: now.duration_since(warning.last).unwrap_or_default().as_secs(),
        });
        shown.collect()
    }
}

// === impl NodeStatus ===

impl NodeStatus {
    /// The page for people: first what the probes print, too, then all else. Texts of others are in printable ASCII.
    #[must_use]
    pub fn text(&self) -> String {
        let mut lines = vec![if self.ready { "ready" } else { "not ready" }.to_owned()];
        lines.extend(self.pending.iter().map(|name| format!("pending: {name}")));
        let mut row = |name: &str, says: String| lines.push(format!("{name:15} {says}"));
        row("agent", format!("{}, up {}", self.version, span(self.uptime_seconds)));
        row("node", self.node.clone().unwrap_or_else(|| "no --node-name".to_owned()));
        row(
            "interception",
            match self.interception.as_str() {
                "off" => "off".to_owned(),
                mode => format!("{mode}, path {}", self.path),
            },
        );
        if self.interception != "off" {
            row("self-test", self.self_test.clone().unwrap_or_else(|| "none yet".to_owned()));
            row("guard route", self.guard.clone().unwrap_or_else(|| "not tried yet".to_owned()));
        }
        if let Some(lease) = self.lease {
            let says = if lease { "renewed" } else { "not renewed: pods are denied" };
            row("lease", says.to_owned());
        }
        row("credentials", self.credentials.line());
        for waiting in &self.credentials.waiting {
            row("  waiting", waiting.clone());
        }
        for FailingRole { role, error, retry_seconds } in &self.credentials.errors {
            row("  failing", format!("{role}: {error}; retried in {}", span(*retry_seconds)));
        }
        row("watches", self.watches_line());
        row("pods", self.pods.line());
        for (name, text) in &self.details {
            row(name, text.clone());
        }
        for LoggedWarning { level, text, count, seconds_ago } in &self.warnings {
            row(level, format!("{} ago, {}: {text}", span(*seconds_ago), times(*count)));
        }
        lines.into_iter().map(|line| plain(&line) + "\n").collect()
    }

    fn watches_line(&self) -> String {
        let watches = self.watches.iter().map(|(kind, seconds)| match seconds {
            Some(seconds) => format!("{kind} heard from {} ago", span(*seconds)),
            None => format!("{kind} not heard from yet"),
        });
        watches.collect::<Vec<_>>().join(", ")
    }
}

// === impl CredentialCounts ===

impl CredentialCounts {
    fn line(&self) -> String {
        let Self { ready, pending, failing, .. } = self;
        let mut line = format!("{ready} ready, {pending} pending, {failing} failing");
        if let (Some(oldest), Some(soonest)) = (self.oldest_seconds, self.soonest_expiry_seconds) {
            line += &format!("; oldest {}, soonest expires in {}", span(oldest), span(soonest));
        }
        line
    }
}

/// A time in two units at most, such as `3h 12m`.
#[must_use]
pub fn span(seconds: u64) -> String {
    let units = [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)];
    let at = units.iter().position(|(_, size)| seconds >= *size).unwrap_or(units.len() - 1);
    let (unit, size) = units[at];
    let mut text = format!("{}{unit}", seconds / size);
    if let Some((unit, below)) = units.get(at + 1)
        && seconds % size >= *below
    {
        text += &format!(" {}{unit}", seconds % size / below);
    }
    text
}

/// `text` in one line that no terminal obeys.
fn plain(text: &str) -> String {
    text.chars().map(plain_char).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units_at_most() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (61, "1m 1s"),
            (3600, "1h"),
            (3605, "1h"),
            (11_520, "3h 12m"),
            (90_000, "1d 1h"),
        ] {
            assert_eq!(span(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn the_page_begins_as_probes_print_and_has_no_character_that_a_terminal_obeys() {
        let hostile = "a\u{1b}[2J\n\u{9b}\u{202e}";
        let role =
            FailingRole { role: hostile.to_owned(), error: hostile.to_owned(), retry_seconds: 5 };
        let status = NodeStatus {
            pending: vec!["first credentials".to_owned()],
            interception: "enforce".to_owned(),
            lease: Some(false),
            credentials: CredentialCounts { failing: 1, errors: vec![role], ..Default::default() },
            details: [("boot guard".to_owned(), hostile.to_owned())].into(),
            ..NodeStatus::default()
        };
        let text = status.text();
        assert!(text.starts_with("not ready\npending: first credentials\nagent "), "{text}");
        assert!(text.contains("lease           not renewed: pods are denied\n"), "{text}");
        assert!(text.contains("  failing       a?[2J???: a?[2J???; retried in 5s\n"), "{text}");
        assert!(text.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{text:?}");
        let ready = NodeStatus { ready: true, ..NodeStatus::default() };
        assert!(ready.text().starts_with("ready\nagent "));
    }

    #[test]
    fn a_reader_of_another_version_ignores_what_it_does_not_know() {
        let read: NodeStatus = serde_json::from_str(r#"{"version":"9", "later": 1}"#).unwrap();
        assert_eq!((read.version.as_str(), read.ready), ("9", false));
    }
}

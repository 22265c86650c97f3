//! Prints the checks: aligned lines for people, or one JSON object.

use std::io::{self, Write as _};

use rustix::termios::tcgetwinsize;
use serde::Serialize;

use crate::config::{Output, version};
use kiam_core::preflight::{Check, Verdict};

/// The columns of a terminal that nobody has made wider, and of a log.
const NARROW: usize = 80;
/// The most columns that are used: longer lines are hard to read.
const WIDE: usize = 120;
/// Where the text begins: after the verdict and the name.
const INDENT: usize = 26;
/// What a remedy begins with.
const REMEDY: &str = "do: ";

/// All checks, in their order.
pub(super) struct Report {
    /// `--node-name`.
    pub(super) node: Option<String>,
    pub(super) checks: Vec<Check>,
}

#[derive(Serialize)]
struct JsonReport<'a> {
    version: String,
    node: Option<&'a str>,
    verdict: Verdict,
    checks: Vec<JsonCheck<'a>>,
}

#[derive(Serialize)]
struct JsonCheck<'a> {
    check: &'static str,
    about: &'static str,
    verdict: Verdict,
    finding: &'a str,
    remedy: Option<&'a str>,
}

// === impl Report ===

impl Report {
    /// Prints everything. A reader that has closed the pipe needs no more of it.
    pub(super) fn print(&self, output: Output) {
        let text = match output {
            Output::Text => self.text(columns()),
            Output::Json => self.json(),
        };
        let _ = io::stdout().write_all(text.as_bytes());
    }

    fn text(&self, columns: usize) -> String {
        let node = self.node.as_deref().map(|name| format!(", node {name}")).unwrap_or_default();
        let mut text = format!("{}{node}\n\n", version());
        for Check { topic, verdict, finding, remedy } in &self.checks {
            let width = columns - INDENT;
            let mut lines = wrapped(finding, width);
            if let Some(remedy) = remedy {
                let further = wrapped(remedy, width - REMEDY.len());
                let begins = std::iter::once(REMEDY).chain(std::iter::repeat("    "));
                lines.extend(begins.zip(further).map(|(begin, line)| format!("{begin}{line}")));
            }
            for (number, line) in lines.iter().enumerate() {
                text += &match number {
                    0 => format!("{verdict:7}  {:15}  {line}\n", topic.name()),
                    _ => format!("{:INDENT$}{line}\n", ""),
                };
            }
        }
        // Names and messages of others, which a terminal must not obey.
        let text = text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}");
        text + "\n" + &self.summary() + "\n"
    }

    fn summary(&self) -> String {
        let count = |verdict| self.checks.iter().filter(|check| check.verdict == verdict).count();
        let [ok, warn, fail, unknown] =
            [Verdict::Ok, Verdict::Warn, Verdict::Fail, Verdict::Unknown].map(count);
        let conclusion = match self.worst() {
            Verdict::Fail => "An agent with these flags does not run here, or does not protect.",
            Verdict::Warn | Verdict::Unknown => "An agent with these flags runs here; see above.",
            Verdict::Ok => "An agent with these flags runs here.",
        };
        format!("{ok} ok, {warn} warn, {fail} fail, {unknown} unknown\n{conclusion}")
    }

    fn worst(&self) -> Verdict {
        self.checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok)
    }

    fn json(&self) -> String {
        let checks = self.checks.iter().map(|check| JsonCheck {
            check: check.topic.name(),
            about: check.topic.about(),
            verdict: check.verdict,
            finding: &check.finding,
            remedy: check.remedy.as_deref(),
        });
        let report = JsonReport {
            version: version(),
            node: self.node.as_deref(),
            verdict: self.worst(),
            checks: checks.collect(),
        };
        serde_json::to_string_pretty(&report).expect("text and lists of it are JSON") + "\n"
    }
}

/// The columns to use: of a terminal its own, and elsewhere as few as a terminal has.
fn columns() -> usize {
    let size = tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_col));
    size.clamp(NARROW, WIDE)
}

/// `text` in lines of at most `width` characters, but for longer words. Each line of `text` begins a new one.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut now = String::new();
        for word in line.split_whitespace() {
            let length = now.chars().count() + 1 + word.chars().count();
            if !now.is_empty() && length > width {
                lines.push(std::mem::take(&mut now));
            }
            if !now.is_empty() {
                now.push(' ');
            }
            now += word;
        }
        lines.push(now);
    }
    lines
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Topic;

    use super::*;

    fn report() -> Report {
        let long =
            "a finding that says in many words what it means, so that it needs a second line";
        let checks = vec![
            Check::ok(Topic::Kernel, "6.1.0: fine"),
            Check::fail(
                Topic::EphemeralPorts,
                long,
                "do this, and if that does not help, do the other thing, too",
            ),
        ];
        Report { node: Some("n1".to_owned()), checks }
    }

    #[test]
    fn lines_are_aligned_and_fit() {
        for columns in [NARROW, 100, WIDE] {
            let text = report().text(columns);
            assert!(text.lines().all(|line| line.len() <= columns), "{text}");
            assert!(text.contains("\nok       kernel           6.1.0: fine\n"), "{text}");
            assert!(text.contains("\nfail     ephemeral-ports  a finding"), "{text}");
        }
        let narrow = report().text(NARROW);
        let expected = "\
fail     ephemeral-ports  a finding that says in many words what it means, so
                          that it needs a second line
                          do: do this, and if that does not help, do the other
                              thing, too

1 ok, 0 warn, 1 fail, 0 unknown
An agent with these flags does not run here, or does not protect.
";
        assert!(narrow.ends_with(expected), "{narrow}");
        assert!(narrow.lines().next().unwrap().ends_with(", node n1"), "{narrow}");
    }

    #[test]
    fn a_longer_word_and_a_log_of_lines_are_kept_whole() {
        assert_eq!(wrapped("ab abcdefgh ij\nk", 5), ["ab", "abcdefgh", "ij", "k"]);
        assert_eq!(wrapped("", 5), Vec::<String>::new());
    }

    #[test]
    fn what_others_are_called_does_not_drive_the_terminal() {
        let checks = vec![Check::ok(Topic::Kernel, "by \u{1b}[2Jname\r\u{9b}x")];
        let text = Report { node: None, checks }.text(NARROW);
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
        assert!(text.contains("\u{fffd}[2Jname"), "{text:?}");
    }

    #[test]
    fn json_has_it_all() {
        let json: serde_json::Value = serde_json::from_str(&report().json()).unwrap();
        assert_eq!((&json["verdict"], &json["node"]), (&"fail".into(), &"n1".into()));
        assert_eq!(json["checks"][0]["check"], "kernel");
        assert_eq!(json["checks"][0]["remedy"], serde_json::Value::Null);
        assert_eq!(json["checks"][1]["verdict"], "fail");
        assert!(json["checks"][1]["remedy"].as_str().unwrap().starts_with("do this"), "{json}");
    }
}

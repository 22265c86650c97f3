//! Prints the translation and what else changes, as comments below the output.

use std::fmt::Write as _;

use super::{
    installation::{Evidence, Installation},
    meaning::{Comparison, Finding},
    printable::{is_all_printable, printable},
    rules::Rules,
    translate::{Line, Outcome, Translation},
};
use crate::peers::Program;

/// The longest flag that has the other columns beside it, and not below.
const COLUMN: usize = 44;

/// What is reported.
pub(super) struct Report<'a> {
    pub(super) installation: &'a Installation,
    pub(super) translation: &'a Translation,
    pub(super) comparison: &'a Comparison,
    pub(super) rules: &'a Rules,
}

// === impl Report ===

impl Report<'_> {
    /// How many things somebody must decide.
    pub(super) fn decisions(&self) -> usize {
        let lines = self.translation.lines.iter().filter(|it| it.outcome == Outcome::NoEqual);
        let findings = self.comparison.findings.iter().filter(|finding| finding.decides);
        lines.count() + findings.count()
    }

    /// The report, each line a comment.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![self.found(), String::new()];
        self.flags(&mut lines);
        self.additions(&mut lines);
        self.comparison(&mut lines);
        self.rules(&mut lines);
        self.steps(&mut lines);
        lines.push(match self.decisions() {
            0 => "Nothing is left to decide.".to_owned(),
            1 => "1 thing to decide: the line with \"!\".".to_owned(),
            many => format!("{many} things to decide: the lines with \"!\"."),
        });
        lines.iter().fold(String::new(), |text, line| match line.is_empty() {
            true => text + "#\n",
            false => text + "# " + &printable(line) + "\n",
        })
    }

    /// What was found, and where.
    fn found(&self) -> String {
        let installation = self.installation;
        let name = if installation.is_kube2iam() { "kube2iam" } else { "kiam" };
        let mut text = match &installation.version {
            Some((major, evidence)) => {
                let by = match evidence {
                    Evidence::CommandLine => "--kiam-version".to_owned(),
                    Evidence::Tag => {
                        format!(
                            "the image's tag {}",
                            installation.tag.as_deref().unwrap_or_default()
                        )
                    }
                    Evidence::Flags => "its command line".to_owned(),
                };
                format!("{name} v{major}, by {by}:")
            }
            None => format!("{name}:"),
        };
        for (index, part) in installation.parts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(text, "{comma} {} ({})", part.workload.title(), part.workload.place);
        }
        text
    }

    fn flags(&self, lines: &mut Vec<String>) {
        lines.push("Flags and variables".to_owned());
        let width = |line: &Line| line.written.chars().count();
        let widths = self.translation.lines.iter().map(width).filter(|width| *width <= COLUMN);
        let width = widths.max().unwrap_or_default();
        for line in &self.translation.lines {
            let program = line.program.as_ref().map(Program::to_string).unwrap_or_default();
            let Line { written, outcome, detail, .. } = line;
            let mark = mark(*outcome == Outcome::NoEqual);
            let mut text = format!("{mark} {program:8} {written:width$}");
            if written.chars().count() > width {
                lines.push(text);
                text = format!("  {:8} {:width$}", "", "");
            }
            lines.push(format!("{text}  {outcome:10}  {detail}").trim_end().to_owned());
        }
        lines.push(String::new());
    }

    fn additions(&self, lines: &mut Vec<String>) {
        if self.translation.additions.is_empty() {
            return;
        }
        lines.push("Flags that no old flag names".to_owned());
        let width = self.translation.additions.iter().map(|(flag, _)| flag.len()).max();
        let width = width.unwrap_or_default();
        for (flag, reason) in &self.translation.additions {
            lines.push(format!("  {flag:width$}  {reason}"));
        }
        lines.push(String::new());
    }

    fn comparison(&self, lines: &mut Vec<String>) {
        lines.push("Pods and namespaces".to_owned());
        let Comparison { findings, notes } = self.comparison;
        for Finding { decides, subject, text, remedy } in findings {
            lines.push(format!("{} {subject}: {text}", mark(*decides)));
            lines.extend(remedy.iter().map(|remedy| command(remedy)));
        }
        if findings.is_empty() && notes.is_empty() {
            lines.push("  nothing changes for those of the input".to_owned());
        }
        lines.extend(notes.iter().map(|note| format!("  ({note})")));
        lines.push(String::new());
    }

    fn rules(&self, lines: &mut Vec<String>) {
        let Rules { notes, commands } = self.rules;
        lines.push("Rules to remove, on each node, once the new agent is Ready there".to_owned());
        lines.extend(commands.iter().map(|text| command(text)));
        lines.extend(notes.iter().map(|note| format!("  ({note})")));
        lines.push(String::new());
    }

    /// What flags say nothing of.
    fn steps(&self, lines: &mut Vec<String>) {
        let installation = self.installation;
        lines.push("Besides".to_owned());
        if !installation.is_kube2iam() {
            let who = match installation.value("assume-role-arn").filter(|it| !it.is_empty()) {
                Some(role) => format!("that role must trust the nodes' role: {role}"),
                None => "the pods' roles must trust the nodes' role beside the servers', or --assume-role-arn the servers'".to_owned(),
            };
            lines
                .push(format!("  every node's agent calls STS, which only the servers did: {who}"));
        }
        if installation.agent().is_some_and(|agent| agent.workload.is_placed) {
            lines.push(
                "  the old agent runs on some nodes only; this one must run wherever a pod with a role can".to_owned(),
            );
        }
        lines.push("  the steps of the change, and the way back: docs/migrating.md".to_owned());
        lines.push(String::new());
    }
}

fn mark(decides: bool) -> char {
    if decides { '!' } else { ' ' }
}

/// A command for the operator's shell, unless it would be another than the one that is shown.
fn command(text: &str) -> String {
    match is_all_printable(text) {
        true => format!("    {text}"),
        false => {
            "    (no command here: a text in it has characters that are not printed)".to_owned()
        }
    }
}

//! `kubectl kiam check`: the preflight of each node, with the flags of the agent that runs there.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    ask::Asker,
    fleet::{Fleet, FleetNode},
    output::Report,
    table::{Cell, Column, Row, Screen, Table, Tone},
    trouble::{State, Trouble},
};
use crate::admin::NodeStatus;

/// The most nodes that are named beside a finding.
const NAMED: usize = 6;

/// What `kiam-agent preflight --output=json` prints, as far as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Preflight {
    verdict: String,
    checks: Vec<NodeCheck>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct NodeCheck {
    check: String,
    verdict: String,
    finding: String,
    remedy: Option<String>,
}

/// All nodes.
#[derive(Debug, Serialize)]
pub(super) struct CheckReport {
    nodes: Vec<CheckedNode>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct CheckedNode {
    node: String,
    preflight: Option<Preflight>,
    trouble: Option<Trouble>,
}

/// Runs the preflight of all nodes.
pub(super) async fn check(asker: &Asker, fleet: Fleet) -> CheckReport {
    let nodes = asker.each(&fleet.nodes, |node| async move {
        let (preflight, trouble) = match of_node(asker, node).await {
            Ok(preflight) => (Some(preflight), None),
            Err(trouble) => (None, Some(trouble)),
        };
        CheckedNode { node: node.name.clone(), preflight, trouble }
    });
    CheckReport { nodes: nodes.await, warnings: fleet.warnings }
}

async fn of_node(asker: &Asker, node: &FleetNode) -> Result<Preflight, Trouble> {
    // The flags decide what is checked.
    let status: NodeStatus = asker.ask_node(node, &["status", "--output=json"]).await?;
    let arguments = status.arguments.iter().map(String::as_str);
    let words: Vec<&str> =
        ["preflight", "--output=json", "--"].into_iter().chain(arguments).collect();
    asker.ask_node(node, &words).await
}

// === impl CheckReport ===

impl Report for CheckReport {
    fn text(&self, screen: Screen) -> String {
        let columns = ["NODE", "VERDICT", "FAIL", "WARN", "UNKNOWN"];
        let columns = columns.map(|title| Column { title, rank: 0 }).to_vec();
        let rows = self.nodes.iter().map(CheckedNode::row).collect();
        let mut text = Table { columns, rows }.text(screen);
        for (finding, nodes) in self.grouped() {
            text.push('\n');
            text += &finding.text(&nodes, screen);
        }
        for warning in &self.warnings {
            text += &screen.painted(&Cell::plain(warning).to_string(), Tone::Warn);
            text.push('\n');
        }
        text
    }

    fn is_good(&self) -> bool {
        let is_good = |node: &CheckedNode| {
            // A word that this program does not know may be worse.
            let verdicts = ["ok", "warn", "unknown"];
            node.preflight.as_ref().is_some_and(|it| verdicts.contains(&it.verdict.as_str()))
        };
        !self.nodes.is_empty() && self.warnings.is_empty() && self.nodes.iter().all(is_good)
    }
}

impl CheckReport {
    /// What is not ok, the gravest first, with the nodes where it is so. Equal findings are one.
    fn grouped(&self) -> Vec<(&NodeCheck, Vec<&str>)> {
        let mut groups: BTreeMap<(usize, &str, &str), (&NodeCheck, Vec<&str>)> = BTreeMap::new();
        for node in &self.nodes {
            let checks = node.preflight.iter().flat_map(|preflight| &preflight.checks);
            for check in checks.filter(|check| check.verdict != "ok") {
                let gravity =
                    ["fail", "warn", "unknown"].iter().position(|it| *it == check.verdict);
                let key = (gravity.unwrap_or(usize::MAX), &*check.check, &*check.finding);
                groups.entry(key).or_insert_with(|| (check, Vec::new())).1.push(&node.node);
            }
        }
        groups.into_values().collect()
    }
}

// === impl NodeCheck ===

impl NodeCheck {
    fn text(&self, nodes: &[&str], screen: Screen) -> String {
        let named = nodes.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        let more = match nodes.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let Self { check, verdict, finding, remedy } = self;
        let head = format!("{verdict} {check}: {named}{more}");
        let mut lines = vec![(head, 0, tone(verdict)), (finding.clone(), 4, Tone::Plain)];
        lines.extend(remedy.as_ref().map(|remedy| (format!("do: {remedy}"), 4, Tone::Faint)));
        let mut text = String::new();
        for (line, indent, tone) in lines {
            for part in screen.wrapped(&Cell::plain(line).to_string(), indent) {
                text += &format!("{:indent$}{}\n", "", screen.painted(&part, tone));
            }
        }
        text
    }
}

// === impl CheckedNode ===

impl CheckedNode {
    fn row(&self) -> Row {
        let mut row = Row { cells: vec![Cell::plain(&self.node)], notes: Vec::new() };
        if let Some(Preflight { verdict, checks }) = &self.preflight {
            row.cells.push(Cell::new(verdict, tone(verdict)));
            for verdict in ["fail", "warn", "unknown"] {
                let count = checks.iter().filter(|check| check.verdict == verdict).count();
                let tone = if count > 0 { tone(verdict) } else { Tone::Plain };
                row.cells.push(Cell::new(count.to_string(), tone));
            }
        }
        if let Some(Trouble { state, cause, remedy }) = &self.trouble {
            row.cells.push(Cell::new(state.to_string(), State::tone(*state)));
            row.note(cause, state.tone());
            row.note(format!("do: {remedy}"), Tone::Faint);
        }
        row
    }
}

fn tone(verdict: &str) -> Tone {
    match verdict {
        "ok" => Tone::Good,
        "fail" => Tone::Bad,
        _ => Tone::Warn,
    }
}

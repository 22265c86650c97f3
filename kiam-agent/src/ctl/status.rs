//! `kubectl kiam status`: the agent of each node.

use serde::Serialize;

use super::{
    ask::Asker,
    findings::{Finding, findings},
    fleet::{Fleet, FleetNode},
    output::Report,
    table::{Cell, Column, Row, Screen, Table, Tone},
    trouble::State,
};
use crate::admin::{NodeStatus, span};

const COLUMNS: [Column; 10] = [
    Column { title: "NODE", rank: 0 },
    Column { title: "STATE", rank: 0 },
    Column { title: "PATH", rank: 4 },
    Column { title: "SELF-TEST", rank: 2 },
    Column { title: "GUARD", rank: 3 },
    Column { title: "SERVED", rank: 1 },
    Column { title: "CREDENTIALS", rank: 6 },
    Column { title: "OLDEST", rank: 5 },
    Column { title: "UP", rank: 8 },
    Column { title: "VERSION", rank: 7 },
];

/// All nodes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatusReport {
    nodes: Vec<NodeRow>,
    warnings: Vec<String>,
}

/// A node, with its agent's state, or why there is none.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeRow {
    node: String,
    state: State,
    agent: Option<String>,
    /// What is wrong, and what to do.
    findings: Vec<Finding>,
    status: Option<NodeStatus>,
}

/// Asks the agents of all nodes.
pub(super) async fn status(asker: &Asker, fleet: Fleet) -> StatusReport {
    let nodes = asker.each(&fleet.nodes, |node| row(asker, node)).await;
    StatusReport { nodes, warnings: fleet.warnings }
}

async fn row(asker: &Asker, node: &FleetNode) -> NodeRow {
    let name = node.name.clone();
    let asked = asker.ask_node::<NodeStatus>(node, &["status", "--output=json"]).await;
    let agent = node.agent.as_ref().ok().map(|agent| agent.at.pod.clone());
    match asked {
        Ok(status) => NodeRow {
            node: name,
            state: if status.ready { State::Ok } else { State::NotReady },
            agent,
            findings: findings(&status),
            status: Some(status),
        },
        Err(trouble) => NodeRow {
            node: name,
            state: trouble.state,
            agent,
            findings: vec![Finding { cause: trouble.cause, remedy: trouble.remedy }],
            status: None,
        },
    }
}

// === impl StatusReport ===

impl Report for StatusReport {
    fn text(&self, screen: Screen) -> String {
        let rows = self.nodes.iter().map(NodeRow::row).collect();
        let mut text = Table { columns: COLUMNS.to_vec(), rows }.text(screen);
        for warning in &self.warnings {
            text += &screen.painted(&Cell::plain(warning).to_string(), Tone::Warn);
            text.push('\n');
        }
        let good = self.nodes.iter().filter(|node| node.state == State::Ok).count();
        let all = self.nodes.len();
        text + &format!("{good} of {all} nodes have an agent that is ready\n")
    }

    fn is_good(&self) -> bool {
        // Where nodes can't be listed, or there are none, nobody knows that all have an agent.
        !self.nodes.is_empty()
            && self.warnings.is_empty()
            && self.nodes.iter().all(|node| node.state == State::Ok)
    }
}

// === impl NodeRow ===

impl NodeRow {
    fn row(&self) -> Row {
        let mut cells =
            vec![Cell::plain(&self.node), Cell::new(self.state.to_string(), self.tone())];
        cells.extend(self.status.iter().flat_map(of_status));
        let mut row = Row { cells, notes: Vec::new() };
        for Finding { cause, remedy } in &self.findings {
            row.note(cause, self.tone());
            row.note(format!("do: {remedy}"), Tone::Faint);
        }
        row
    }

    /// An agent that is ready may still have something to say.
    fn tone(&self) -> Tone {
        match self.state {
            State::Ok if !self.findings.is_empty() => Tone::Warn,
            state => state.tone(),
        }
    }
}

fn of_status(status: &NodeStatus) -> [Cell; 8] {
    let paths = status.pods.by_path.iter().map(|(path, count)| format!("{path} {count}"));
    let paths = match paths.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => status.path.clone(),
        paths => paths,
    };
    let path = match status.interception.as_str() {
        "enforce" => paths,
        mode => format!("{mode}: {paths}"),
    };
    let credentials = &status.credentials;
    let (pending, failing) = (credentials.pending, credentials.failing);
    let mut held = format!("{} ready", credentials.ready);
    for (count, what) in [(pending, "pending"), (failing, "failing")] {
        if count > 0 {
            held += &format!(", {count} {what}");
        }
    }
    let (passed, holds) = (status.self_test.as_deref(), status.guard.as_deref());
    let word = |text: Option<&str>, good: &str| match text {
        None => Cell::new("-", Tone::Faint),
        Some(text) if text == good => Cell::new(text, Tone::Good),
        Some(_) if good == "passed" => Cell::new("fails", Tone::Bad),
        Some(text) if text.starts_with("open") => Cell::new("open", Tone::Bad),
        Some(text) => Cell::new(text, Tone::Warn),
    };
    // `kiam-agent 0.1.0 (commit …)`.
    let version = status.version.split(' ').nth(1).unwrap_or(&status.version);
    let tone = |bad: bool| if bad { Tone::Bad } else { Tone::Plain };
    [
        Cell::plain(path),
        word(passed, "passed"),
        word(holds, "holds"),
        Cell::plain(format!("{}/{}", status.pods.served, status.pods.known)),
        Cell::new(held, tone(failing > 0)),
        Cell::plain(credentials.oldest_seconds.map(span).unwrap_or_default()),
        Cell::plain(span(status.uptime_seconds)),
        Cell::plain(version),
    ]
}

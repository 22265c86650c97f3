//! `kubectl kiam pods` and `v1-users`: what all agents know of their pods.

use std::time::SystemTime;

use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    ask::Asker,
    cli::Selection,
    fleet::{Fleet, FleetNode},
    output::Report,
    table::{Cell, Column, Row, Screen, Table, Tone},
    trouble::Trouble,
};
use crate::admin::span;
use kiam_core::{clock::Clock, telemetry::times};

/// The most refused paths, or programs, that a row names.
const NAMED: usize = 3;

/// Pods of all nodes, as their agents know them.
pub(super) struct KnownPods {
    /// Each with its node.
    pub(super) pods: Vec<KnownPod>,
    /// Nodes whose pods are not known.
    pub(super) silent: Vec<SilentNode>,
    pub(super) warnings: Vec<String>,
}

/// A pod, as `kiam-agent pods` shows it, and its node.
#[derive(Clone, Debug, Serialize)]
pub(super) struct KnownPod {
    node: String,
    #[serde(flatten)]
    pod: Value,
}

/// A node whose agent did not tell its pods.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SilentNode {
    node: String,
    #[serde(flatten)]
    trouble: Trouble,
}

/// `pods`.
#[derive(Debug, Serialize)]
pub(super) struct PodsReport {
    pods: Vec<KnownPod>,
    nodes: Vec<SilentNode>,
    warnings: Vec<String>,
}

/// `v1-users`.
#[derive(Debug, Serialize)]
pub(super) struct V1Report {
    pods: Vec<KnownPod>,
    nodes: Vec<SilentNode>,
    warnings: Vec<String>,
}

/// What all agents know of the pods of `selection`.
pub(super) async fn known(asker: &Asker, fleet: Fleet, selection: &Selection) -> KnownPods {
    let mut known =
        KnownPods { pods: Vec::new(), silent: Vec::new(), warnings: fleet.warnings.clone() };
    for answer in asker.each(&fleet.nodes, |node| of_node(asker, node)).await {
        match answer {
            Ok(pods) => known.pods.extend(pods.into_iter().filter(|pod| pod.is_of(selection))),
            Err(silent) => known.silent.push(silent),
        }
    }
    known.pods.sort_by(|a, b| a.name().cmp(&b.name()));
    known
}

async fn of_node(asker: &Asker, node: &FleetNode) -> Result<Vec<KnownPod>, SilentNode> {
    let name = || node.name.clone();
    let pods: Result<Vec<Map<String, Value>>, Trouble> = asker.ask_node(node, &["pods"]).await;
    match pods {
        Ok(pods) => Ok(pods.into_iter().map(|pod| KnownPod::new(name(), pod)).collect()),
        Err(trouble) => Err(SilentNode { node: name(), trouble }),
    }
}

// === impl SilentNode ===

impl SilentNode {
    fn title(&self) -> String {
        format!("{} ({})", self.node, self.trouble.state)
    }
}

// === impl KnownPods ===

impl KnownPods {
    /// The pods that name a role or asked, or with `all` every one.
    pub(super) fn report(self, all: bool) -> PodsReport {
        let Self { mut pods, silent, warnings } = self;
        pods.retain(|pod| all || pod.concerns_kiam());
        PodsReport { pods, nodes: silent, warnings }
    }

    /// The pods that asked without a token, those that did most first.
    pub(super) fn v1(self) -> V1Report {
        let Self { mut pods, silent, warnings } = self;
        pods.retain(|pod| pod.without_token() > 0);
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.without_token()));
        V1Report { pods, nodes: silent, warnings }
    }
}

// === impl KnownPod ===

impl KnownPod {
    /// What the agent of `node` says of a pod. It can't say that the pod is on another node.
    fn new(node: String, mut pod: Map<String, Value>) -> Self {
        pod.remove("node");
        Self { node, pod: Value::Object(pod) }
    }

    fn text(&self, name: &str) -> &str {
        self.pod[name].as_str().unwrap_or_default()
    }

    fn name(&self) -> (&str, &str) {
        (self.text("namespace"), self.text("name"))
    }

    fn title(&self) -> String {
        let (namespace, name) = self.name();
        format!("{namespace}/{name}")
    }

    fn is_of(&self, selection: &Selection) -> bool {
        let Selection { namespace, .. } = selection;
        namespace.is_empty() || namespace.iter().any(|it| it == self.text("namespace"))
    }

    fn concerns_kiam(&self) -> bool {
        let rejected = self.list("rejected").next().is_some();
        self.pod["role"].is_string()
            || self.pod["annotation"].is_string()
            || self.pod["lastRequest"].is_string()
            || rejected
    }

    fn list(&self, name: &str) -> impl Iterator<Item = &Value> {
        self.pod[name].as_array().into_iter().flatten()
    }

    /// Requests that were accepted, or rejected, for they had no token.
    fn without_token(&self) -> u64 {
        let accepted = self.pod["requestsWithoutToken"].as_u64().unwrap_or_default();
        let rejected = self.list("rejected").filter(|it| it["reason"] == "TokenMissing");
        accepted + rejected.filter_map(|it| it["count"].as_u64()).sum::<u64>()
    }

    /// The state of its credentials.
    fn state(&self) -> Cell {
        let credentials = &self.pod["credentials"];
        let refused = self.pod["refused"].is_string();
        let (word, tone) = match () {
            () if self.pod["live"] == false => ("ended", Tone::Faint),
            () if self.pod["served"] == true => ("served", Tone::Good),
            () if self.text("answer").starts_with("the real metadata") => ("node's", Tone::Plain),
            () if refused && self.pod["annotation"].is_null() => ("no role", Tone::Faint),
            () if refused => ("refused", Tone::Bad),
            () if credentials["failed"].is_string() => ("failing", Tone::Bad),
            () if self.text("answer").contains("can't connect") => ("no path", Tone::Bad),
            () => ("pending", Tone::Warn),
        };
        Cell::new(word, tone)
    }

    fn role(&self) -> &str {
        let role = self.text("role");
        let role = if role.is_empty() { self.text("annotation") } else { role };
        role.rsplit_once(":role/").map_or(role, |(_, name)| name)
    }

    fn row(&self, now: SystemTime) -> Row {
        let path = self.text("pathKind");
        let last = ago(self.text("lastRequest"), now);
        let rejected: u64 = self.list("rejected").filter_map(|it| it["count"].as_u64()).sum();
        let mut row = Row {
            cells: vec![
                Cell::plain(self.title()),
                self.state(),
                Cell::plain(self.role()),
                Cell::plain(until(&self.pod["credentials"]["expiration"], now)),
                Cell::plain(path),
                Cell::plain(last.map(|last| format!("{last} ago")).unwrap_or_default()),
                Cell::new(
                    if rejected == 0 { String::new() } else { rejected.to_string() },
                    Tone::Warn,
                ),
                Cell::plain(&self.node),
            ],
            notes: Vec::new(),
        };
        let is_refused = self.pod["served"] != true && !self.pod["annotation"].is_null();
        if is_refused && self.pod["live"] == true {
            row.note(self.text("answer"), Tone::Bad);
        }
        for request in self.list("rejected").take(NAMED) {
            let field = |name: &str| request[name].as_str().unwrap_or_default();
            let count = request["count"].as_u64().unwrap_or_default();
            let (method, path, reason) = (field("method"), field("path"), field("reason"));
            row.note(format!("rejected {}: {method} {path} ({reason})", times(count)), Tone::Warn);
        }
        row
    }
}

// === impl PodsReport ===

impl Report for PodsReport {
    fn text(&self, screen: Screen) -> String {
        const COLUMNS: [Column; 8] = [
            Column { title: "POD", rank: 0 },
            Column { title: "STATE", rank: 0 },
            Column { title: "ROLE", rank: 0 },
            Column { title: "EXPIRES", rank: 3 },
            Column { title: "PATH", rank: 4 },
            Column { title: "LAST REQUEST", rank: 1 },
            Column { title: "REJECTED", rank: 2 },
            Column { title: "NODE", rank: 5 },
        ];
        let now = Clock::system().now();
        let rows = self.pods.iter().map(|pod| pod.row(now)).collect();
        Table { columns: COLUMNS.to_vec(), rows }.text(screen)
            + &silent(&self.nodes, &self.warnings, screen)
    }

    fn is_good(&self) -> bool {
        self.nodes.is_empty() && self.warnings.is_empty()
    }

    fn left_out(&self) -> Vec<String> {
        self.nodes.iter().map(SilentNode::title).collect()
    }
}

// === impl V1Report ===

impl Report for V1Report {
    fn text(&self, screen: Screen) -> String {
        const COLUMNS: [Column; 4] = [
            Column { title: "POD", rank: 0 },
            Column { title: "WITHOUT TOKEN", rank: 0 },
            Column { title: "LAST REQUEST", rank: 1 },
            Column { title: "NODE", rank: 2 },
        ];
        let now = Clock::system().now();
        let rows = self.pods.iter().map(|pod| {
            let last = ago(pod.text("lastRequest"), now);
            let mut row = Row {
                cells: vec![
                    Cell::plain(pod.title()),
                    Cell::new(pod.without_token().to_string(), Tone::Warn),
                    Cell::plain(last.map(|last| format!("{last} ago")).unwrap_or_default()),
                    Cell::plain(&pod.node),
                ],
                notes: Vec::new(),
            };
            for program in programs(pod) {
                row.note(program, Tone::Plain);
            }
            row
        });
        let rows: Vec<_> = rows.collect();
        let none = if rows.is_empty() {
            "no pod asked without a token since its node's agent started\n"
        } else {
            ""
        };
        let table = Table { columns: COLUMNS.to_vec(), rows };
        let table = if none.is_empty() { table.text(screen) } else { none.to_owned() };
        table + &silent(&self.nodes, &self.warnings, screen)
    }

    fn is_good(&self) -> bool {
        self.nodes.is_empty() && self.warnings.is_empty()
    }

    fn left_out(&self) -> Vec<String> {
        self.nodes.iter().map(SilentNode::title).collect()
    }
}

/// The programs that asked without a token, with their last paths.
fn programs(pod: &KnownPod) -> Vec<String> {
    let rejected = pod.list("rejected").filter(|it| it["reason"] == "TokenMissing");
    let requests = pod.list("imdsv1").chain(rejected);
    let mut programs: Vec<(&str, u64)> = Vec::new();
    for request in requests {
        let name = request["userAgent"].as_str().unwrap_or_default();
        let count = request["count"].as_u64().unwrap_or_default();
        match programs.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += count,
            None => programs.push((name, count)),
        }
    }
    let shown = programs.into_iter().take(NAMED).map(|(name, count)| match name {
        "" => format!("{}, by a program without a User-Agent", times(count)),
        name => format!("{}, by {name}", times(count)),
    });
    shown.collect()
}

/// Nodes whose pods are missing from a table.
fn silent(nodes: &[SilentNode], warnings: &[String], screen: Screen) -> String {
    let mut text = String::new();
    let mut line = |says: String, tone| {
        for part in screen.wrapped(&Cell::plain(says).to_string(), 0) {
            text += &screen.painted(&part, tone);
            text.push('\n');
        }
    };
    for SilentNode { node, trouble } in nodes {
        line(format!("node {node} is left out, {}: {}", trouble.state, trouble.cause), Tone::Bad);
    }
    for warning in warnings {
        line(warning.clone(), Tone::Warn);
    }
    text
}

/// How long ago a time of the agent was.
fn ago(time: &str, now: SystemTime) -> Option<String> {
    let time = humantime::parse_rfc3339(time).ok()?;
    Some(span(now.duration_since(time).unwrap_or_default().as_secs()))
}

/// How long it is until a time of the agent.
fn until(time: &Value, now: SystemTime) -> String {
    let time = time.as_str().and_then(|time| humantime::parse_rfc3339(time).ok());
    let left = time.map(|time| time.duration_since(now).unwrap_or_default().as_secs());
    left.map(|left| format!("in {}", span(left))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_agent_speaks_for_its_own_node_alone() {
        let pod = json!({ "namespace": "shop", "name": "a", "node": "another" });
        let pod = KnownPod::new("n1".to_owned(), pod.as_object().unwrap().clone());
        let shown = serde_json::to_string(&pod).unwrap();
        assert_eq!(shown.matches("\"node\"").count(), 1, "{shown}");
        assert!(shown.contains(r#""node":"n1""#), "{shown}");
    }
}

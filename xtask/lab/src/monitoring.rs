//! The alerts and the dashboard of `deploy/monitoring`, as tests read them.

use std::fs;

use serde_json::Value;
use xtask::command::workspace;

const RULES: &str = "deploy/monitoring/prometheusrule.yaml";
const DASHBOARD: &str = "deploy/monitoring/dashboard.json";

/// One alert.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Alert {
    pub name: String,
    pub expression: String,
    pub severity: String,
    pub runbook: String,
}

/// One panel of the dashboard.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Panel {
    pub title: String,
    pub unit: String,
    /// Drawn as one number.
    pub is_stat: bool,
    /// Drawn on top of each other.
    pub is_stacked: bool,
    /// Left edge, top, width and height, on a grid of 24 columns.
    pub place: [u32; 4],
    pub description: String,
    /// What is asked, and how each series is named.
    pub targets: Vec<(String, String)>,
}

/// The rules file: what the operator's object has as its `spec`.
///
/// # Panics
///
/// When it can't be read.
#[must_use]
pub fn rules() -> Value {
    let object: Value = serde_saphyr::from_str(&text(RULES)).expect("the rules are YAML");
    object["spec"].clone()
}

/// All alerts of the rules.
///
/// # Panics
///
/// When one lacks a field.
#[must_use]
pub fn alerts() -> Vec<Alert> {
    let rules = rules();
    let groups = rules["groups"].as_array().expect("the rules have groups").iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().expect("a group has rules"));
    let alert = |rule: &Value| Alert {
        name: word(&rule["alert"]),
        expression: word(&rule["expr"]),
        severity: word(&rule["labels"]["severity"]),
        runbook: word(&rule["annotations"]["runbook_url"]),
    };
    rules.map(alert).collect()
}

/// All panels of the dashboard, with Grafana's variables replaced: all nodes, and `window` for rates.
///
/// # Panics
///
/// When one lacks a field.
#[must_use]
pub fn panels(window: &str) -> Vec<Panel> {
    let dashboard: Value = serde_json::from_str(&text(DASHBOARD)).expect("the dashboard is JSON");
    let panels = dashboard["panels"].as_array().expect("the dashboard has panels").iter();
    let filled = |expression: &str| {
        expression.replace("$instance", ".*").replace("$__rate_interval", window)
    };
    let panel = |panel: &Value| {
        let place = ["x", "y", "w", "h"]
            .map(|side| panel["gridPos"][side].as_u64().expect("a panel has a place"));
        let targets = panel["targets"].as_array().into_iter().flatten();
        Panel {
            title: word(&panel["title"]),
            unit: panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap_or_default().to_owned(),
            is_stat: panel["type"] == "stat",
            is_stacked: panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal",
            place: place.map(|side| u32::try_from(side).expect("a place is small")),
            description: panel["description"].as_str().unwrap_or_default().to_owned(),
            targets: targets
                .map(|target| (filled(&word(&target["expr"])), word(&target["legendFormat"])))
                .collect(),
        }
    };
    panels.map(panel).collect()
}

/// The selectors of an expression that are of the agent's metrics, such as `kiam_sandboxes{state="ready"}`.
#[must_use]
pub fn selectors(expression: &str) -> Vec<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = Vec::new();
    for (at, _) in expression.match_indices("kiam_") {
        let rest = &expression[at..];
        let name = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let labels = match rest[name..].starts_with('{') {
            true => rest[name..].find('}').map_or(0, |end| end + 1),
            false => 0,
        };
        found.push(rest[..name + labels].to_owned());
    }
    found
}

fn word(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

fn text(path: &str) -> String {
    fs::read_to_string(workspace().join(path)).expect(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_found_with_their_labels() {
        let expression = r#"sum by (a) (rate(kiam_b_total{c="d"}[5m])) > 0 unless kiam_e"#;
        assert_eq!(selectors(expression), [r#"kiam_b_total{c="d"}"#, "kiam_e"]);
    }
}

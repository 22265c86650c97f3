//! The alerts and the dashboard of `deploy/monitoring`: the metrics that they name exist, and each metric is used.
//!
//! `rules.test.yaml` is what `promtool test rules` reads. `tests/dashboards` feeds both with a real agent.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use lab::monitoring::{alerts, panels, rules, selectors};
use serde_json::{Value, json};
use xtask::prometheus::Prometheus;

const RUNBOOK: &str = "docs/runbook.md";
const SERIES: &str = "kiam-agent/tests/alerts/rules.test.yaml";
/// Suffixes of a histogram's series.
const PARTS: [&str; 3] = ["_bucket", "_sum", "_count"];

fn page(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::read_to_string(root.join(path)).unwrap()
}

/// The names of the tests that `promtool` runs.
fn series_tests() -> Vec<String> {
    let tests: Value = serde_saphyr::from_str(&page(SERIES)).unwrap();
    let tests = tests["tests"].as_array().unwrap().iter();
    tests.map(|test| test["name"].as_str().unwrap().to_owned()).collect()
}

/// A folder in which `promtool` finds the tests and these rules.
fn stage(rules: &Value) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("rules.yaml"), rules.to_string()).unwrap();
    let tests = folder.path().join("rules.test.yaml");
    fs::write(&tests, page(SERIES)).unwrap();
    (folder, tests)
}

/// Which tests fail with these rules, and what `promtool` says.
fn failing(package: &Prometheus, rules: &Value) -> (BTreeSet<String>, String) {
    let (_folder, tests) = stage(rules);
    let output = package.promtool().args(["test", "rules"]).arg(tests).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let named =
        |line: &str| Some(line.trim().strip_prefix("name: ")?.split(',').next()?.to_owned());
    (text.lines().filter_map(named).collect(), text)
}

/// All rules with another expression, and firing at once.
fn with_expression(expression: &str) -> Value {
    let mut rules = rules();
    for rule in rules["groups"][0]["rules"].as_array_mut().unwrap() {
        rule["expr"] = json!(expression);
        rule.as_object_mut().unwrap().remove("for");
    }
    rules
}

#[test]
fn each_alert_fires_on_its_fault_and_on_nothing_like_it() {
    let Some(package) = lab::prometheus::package("alerts") else { return };
    // The page on installing makes a rules file of the operator's object so: sed '1,/^spec:/d'.
    let object = page("deploy/monitoring/prometheusrule.yaml");
    let (_, spec) = object.split_once("\nspec:\n").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let rules_file = folder.path().join("rules.yaml");
    fs::write(&rules_file, spec).unwrap();
    let check = package.promtool().args(["check", "rules"]).arg(rules_file).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    let (failing_tests, text) = failing(&package, &rules());
    assert!(failing_tests.is_empty() && text.contains("SUCCESS"), "{text}");
    // And each of the tests can fail: where nothing fires, and where all does.
    let of_kind =
        |kind: &str| -> usize { series_tests().iter().filter(|name| name.contains(kind)).count() };
    for (expression, kind) in [("vector(1) < 0", " fires"), ("vector(1)", " stays quiet")] {
        let (_, text) = failing(&package, &with_expression(expression));
        let failed = text.matches("got:").count();
        assert_eq!(failed, of_kind(kind), "{expression}: {text}");
    }
}

#[test]
fn each_alert_is_tested_both_ways_and_has_an_entry_in_the_runbook() {
    let (tests, runbook) = (series_tests(), page(RUNBOOK));
    let alerts = alerts();
    assert!(alerts.len() > 20, "{}", alerts.len());
    for alert in &alerts {
        let name = &alert.name;
        for kind in ["fires", "stays quiet"] {
            let (alone, reasoned) = (format!("{name} {kind}"), format!("{name} {kind}: "));
            let is_there = tests.iter().any(|test| *test == alone || test.starts_with(&reasoned));
            assert!(is_there, "{SERIES} has no test that {name} {kind}");
        }
        assert!(runbook.contains(&format!("\n### {name}\n")), "{RUNBOOK} has no entry for {name}");
        let place = format!("/{RUNBOOK}#{}", name.to_lowercase());
        assert!(alert.runbook.ends_with(&place), "{name}: {}", alert.runbook);
        let severity = format!("\n### {name}\n\n*{}*", alert.severity);
        assert!(runbook.contains(&severity), "{RUNBOOK}: {name} is of severity {}", alert.severity);
    }
    assert_eq!(tests.len(), 2 * alerts.len(), "{tests:?}");
    let entries = runbook.lines().filter(|line| line.starts_with("### Kiam")).count();
    assert_eq!(entries, alerts.len(), "{RUNBOOK} has an entry for an alert that is not there");
    for severity in ["critical", "warning", "info"] {
        assert!(alerts.iter().any(|alert| alert.severity == severity), "{severity}");
    }
}

/// The metrics of expressions, without the suffixes of a histogram's series.
fn metrics<'a>(expressions: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let name = |selector: String| {
        let name = selector.split('{').next().unwrap().to_owned();
        let whole = PARTS.iter().find_map(|part| name.strip_suffix(part)).map(str::to_owned);
        whole.unwrap_or(name)
    };
    expressions.flat_map(selectors).map(name).collect()
}

#[test]
fn each_metric_is_used_by_an_alert_or_the_dashboard_and_these_use_no_other() {
    let (alerts, panels) = (alerts(), panels("1m"));
    let targets = panels.iter().flat_map(|panel| &panel.targets);
    let expressions = targets.map(|(expression, _)| expression.as_str());
    let used = metrics(expressions.chain(alerts.iter().map(|alert| alert.expression.as_str())));
    let listed = page("docs/metrics.md");
    let rows = listed.lines().filter_map(|line| line.strip_prefix("| `kiam_")?.split_once("` |"));
    let listed: BTreeSet<String> = rows.map(|(name, _)| format!("kiam_{name}")).collect();
    assert!(listed.len() > 30, "{listed:?}");
    assert_eq!(used, listed);
}

#[test]
fn panels_name_entries_of_the_runbook() {
    let runbook = page(RUNBOOK);
    let mut named = 0;
    for panel in panels("1m") {
        assert!(panel.targets.is_empty() || !panel.description.is_empty(), "{}", panel.title);
        let words = panel.description.split(|c: char| !c.is_ascii_alphanumeric());
        for alert in words.filter(|word| word.starts_with("Kiam")) {
            assert!(runbook.contains(&format!("\n### {alert}\n")), "{}: {alert}", panel.title);
            named += 1;
        }
    }
    assert!(named > 20, "{named}");
}

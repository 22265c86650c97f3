//! The README's tables say what the program does.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use kiam_agent::config;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// First cells, without backquotes, of the README's table rows that begin with `prefix`.
fn rows(prefix: &str) -> BTreeSet<String> {
    let readme = fs::read_to_string(root().join("README.md")).expect("the README can be read");
    let cells = readme.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    cells.map(|(cell, _)| cell.to_owned()).filter(|cell| cell.starts_with(prefix)).collect()
}

/// Metrics that are no counters have their own names.
const GAUGES: [&str; 14] = [
    "kiam_cluster_failing",
    "kiam_cluster_pods",
    "kiam_credentials_calls_per_second",
    "kiam_credentials_held",
    "kiam_credentials_waiting",
    "kiam_guard_boot",
    "kiam_guard_route",
    "kiam_guard_uplinks",
    "kiam_intercept_older_pods",
    "kiam_observed_pods",
    "kiam_proof_failing",
    "kiam_sandboxes",
    "kiam_sandboxes_unseen",
    "kiam_sandboxes_unwatched",
];

/// The agent's crates.
const SOURCES: [&str; 3] = ["kiam-agent/src", "kiam-agent/core/src", "kiam-agent/kernel/src"];

/// Names of metrics in the agent's source, as Prometheus shows them.
fn metrics(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("the source can be read").flatten() {
        let path = entry.path();
        // Tests name series, such as a histogram's `_count`.
        if path.ends_with("tests.rs") {
            continue;
        }
        if path.is_dir() {
            metrics(&path, found);
            continue;
        }
        let text = fs::read_to_string(&path).expect("the source is text");
        for literal in text.split('"').filter(|text| text.starts_with("kiam_")) {
            let whole = literal
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit());
            if whole && literal != "kiam_agent" && !is_program(literal) {
                let counter = !literal.ends_with("_seconds") && !GAUGES.contains(&literal);
                found.insert(if counter { format!("{literal}_total") } else { literal.to_owned() });
            }
        }
    }
}

/// Whether it is a program in the kernel object.
fn is_program(name: &str) -> bool {
    let source = fs::read_to_string(root().join("kiam-ebpf/src/main.rs"));
    source.expect("the source can be read").contains(&format!("fn {name}("))
}

#[test]
fn readme_lists_exactly_the_flags() {
    let flags: BTreeSet<String> =
        config::flag_names().into_iter().map(|name| format!("--{name}")).collect();
    assert_eq!(rows("--"), flags);
}

#[test]
fn readme_lists_exactly_the_metrics() {
    let mut found = BTreeSet::new();
    for source in SOURCES {
        metrics(&root().join(source), &mut found);
    }
    assert!(found.len() > 5, "{found:?}");
    assert_eq!(rows("kiam_"), found);
}

/// The kubelet kills an agent that believes in more time than it has, and one that believes in less leaves too early.
#[test]
fn daemonset_gives_the_agent_the_grace_period_that_it_is_told() {
    let manifest = fs::read_to_string(root().join("deploy/daemonset.yaml"));
    let manifest = manifest.expect("the manifest can be read");
    let after = |prefix: &str| {
        let mut found = manifest.lines().filter_map(|line| line.trim().strip_prefix(prefix));
        let value = found.next().map(str::to_owned);
        assert_eq!(found.next(), None, "{prefix} stands there twice");
        value.unwrap_or_else(|| panic!("no {prefix}"))
    };
    let given = after("terminationGracePeriodSeconds: ");
    assert_eq!(after("- --grace-period="), format!("{given}s"));
    // Who patches the arguments away has the default.
    let readme = fs::read_to_string(root().join("README.md")).expect("the README can be read");
    assert!(readme.contains(&format!("| `--grace-period` | `{given}s` |")));
}

/// The security model names the test behind each of its rows: `file::test` or `module::test`.
#[test]
fn readme_names_tests_that_are_there() {
    let text = fs::read_to_string(root().join("README.md")).expect("the README can be read");
    let model = text.split("## Security model").nth(1).expect("there is a security model");
    let rows = model.lines().skip_while(|line| !line.starts_with("| ---")).skip(1);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 15, "{rows:?}");
    assert_proved(&rows);
}

/// So does each fault.
#[test]
fn faults_name_tests_that_are_there() {
    let path = root().join("docs/faults.md");
    let text = fs::read_to_string(path).expect("the table of faults can be read");
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).collect();
    let heads = |row: &&str| !row.starts_with("| ---") && !row.starts_with("| fault |");
    let rows: Vec<&str> = rows.into_iter().filter(heads).collect();
    assert!(rows.len() > 20, "{rows:?}");
    assert_proved(&rows);
}

/// Asserts that the last cell of each row is one or more of `file::test` or `module::test`, and that there are such tests.
fn assert_proved(rows: &[&str]) {
    let cells = rows.iter().filter_map(|row| row.trim_end_matches(" |").rsplit("| ").next());
    for proof in cells.flat_map(|cell| cell.split(", ")) {
        let (place, test) = proof.trim_matches('`').rsplit_once("::").unwrap_or_default();
        let folders = match place.split_once("::") {
            None => vec![format!("kiam-agent/tests/{place}")],
            Some(_) => {
                SOURCES.map(|source| format!("{source}/{}", place.replace("::", "/"))).to_vec()
            }
        };
        let is_there = folders.into_iter().any(|folder| {
            let sources = [format!("{folder}.rs"), format!("{folder}/main.rs"), folder];
            sources.iter().any(|path| holds(&root().join(path), test))
        });
        assert!(is_there && !test.is_empty(), "no test {proof}");
    }
}

/// Whether a source, or one in a folder, has this function.
fn holds(path: &Path, function: &str) -> bool {
    if path.is_dir() {
        let entries = fs::read_dir(path).expect("the folder can be read").flatten();
        return entries.map(|entry| entry.path()).any(|path| holds(&path, function));
    }
    fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("fn {function}(")))
}

//! The documents say what the program does.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use kiam_agent::config;
use xtask::markdown::spans;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn page(path: &str) -> String {
    fs::read_to_string(root().join(path)).expect("the page can be read")
}

/// First cells, without backquotes, of the page's table rows that begin with `prefix`.
fn rows(path: &str, prefix: &str) -> BTreeSet<String> {
    let page = page(path);
    let cells = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    cells.map(|(cell, _)| cell.to_owned()).filter(|cell| cell.starts_with(prefix)).collect()
}

/// Metrics that are no counters have their own names.
const GAUGES: [&str; 18] = [
    "kiam_agent_ready",
    "kiam_build_info",
    "kiam_cluster_failing",
    "kiam_cluster_pods",
    "kiam_credentials_calls_per_second",
    "kiam_credentials_held",
    "kiam_credentials_overdue",
    "kiam_credentials_waiting",
    "kiam_guard_boot",
    "kiam_guard_route",
    "kiam_guard_uplinks",
    "kiam_intercept_older_pods",
    "kiam_intercept_pods_of_unknown_age",
    "kiam_observed_pods",
    "kiam_selftest_failing",
    "kiam_sandboxes",
    "kiam_sandboxes_unseen",
    "kiam_sandboxes_unwatched",
];

/// The agent's crates.
const SOURCES: [&str; 4] =
    ["kiam-agent/src", "kiam-agent/core/src", "kiam-agent/kernel/src", "kiam-agent/requests/src"];

/// String literals of the agent's source that begin with `prefix`.
fn literals(prefix: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in SOURCES {
        collect_literals(&root().join(source), prefix, &mut found);
    }
    found
}

fn collect_literals(folder: &Path, prefix: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("the source can be read").flatten() {
        let path = entry.path();
        // Tests name series, such as a histogram's `_count`.
        if path.ends_with("tests.rs") {
            continue;
        }
        if path.is_dir() {
            collect_literals(&path, prefix, found);
            continue;
        }
        let text = fs::read_to_string(&path).expect("the source is text");
        found.extend(text.split('"').filter(|text| text.starts_with(prefix)).map(str::to_owned));
    }
}

/// Names of metrics in the agent's source, as Prometheus shows them.
fn metrics() -> BTreeSet<String> {
    let names = literals("kiam_").into_iter().filter(|literal| {
        let whole = literal
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit());
        whole && literal != "kiam_agent" && !is_program(literal)
    });
    names
        .map(|name| match name.ends_with("_seconds") || GAUGES.contains(&name.as_str()) {
            true => name,
            false => format!("{name}_total"),
        })
        .collect()
}

/// Whether it is a program in the kernel object.
fn is_program(name: &str) -> bool {
    let source = fs::read_to_string(root().join("kiam-ebpf/src/main.rs"));
    source.expect("the source can be read").contains(&format!("fn {name}("))
}

#[test]
fn flags_page_lists_exactly_the_flags() {
    let flags: BTreeSet<String> =
        config::flag_names().into_iter().map(|name| format!("--{name}")).collect();
    assert_eq!(rows("docs/flags.md", "--"), flags);
}

#[test]
fn metrics_page_lists_exactly_the_metrics() {
    let found = metrics();
    assert!(found.len() > 5, "{found:?}");
    assert_eq!(rows("docs/metrics.md", "kiam_"), found);
}

#[test]
fn annotations_page_lists_exactly_the_annotations() {
    let mut found = literals("iam.amazonaws.com/");
    found.extend(literals("eks.amazonaws.com/"));
    // Messages begin with them too.
    found.retain(|literal| !literal.contains(' '));
    // A label of nodes.
    found.remove("eks.amazonaws.com/compute-type");
    assert!(found.len() > 5, "{found:?}");
    let page = page("docs/annotations.md");
    let cells = page.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").nth(1));
    let names = cells.filter_map(|cell| cell.strip_prefix('`')?.strip_suffix('`'));
    let listed: BTreeSet<String> = names.map(str::to_owned).collect();
    assert_eq!(listed, found);
}

/// The kubelet kills an agent that believes in more time than it has, and one that believes in less leaves too early.
#[test]
fn daemonset_gives_the_agent_the_grace_period_that_it_is_told() {
    let manifest = page("deploy/daemonset.yaml");
    let after = |prefix: &str| {
        let mut found = manifest.lines().filter_map(|line| line.trim().strip_prefix(prefix));
        let value = found.next().map(str::to_owned);
        assert_eq!(found.next(), None, "{prefix} stands there twice");
        value.unwrap_or_else(|| panic!("no {prefix}"))
    };
    let given = after("terminationGracePeriodSeconds: ");
    assert_eq!(after("- --grace-period="), format!("{given}s"));
    // Who patches the arguments away has the default.
    assert!(page("docs/flags.md").contains(&format!("| `--grace-period` | `{given}s` |")));
}

/// The image has no other program than the agent.
#[test]
fn manifests_start_the_agent_alone() {
    let mut commands = 0;
    for manifest in [
        "deploy/daemonset.yaml",
        "deploy/uninstall/daemonset.yaml",
        "deploy/chart/templates/daemonset.yaml",
        "deploy/chart/templates/uninstall.yaml",
    ] {
        let text = page(manifest);
        for command in text.lines().filter_map(|line| line.trim().strip_prefix("command:")) {
            assert!(command.trim().starts_with("[kiam-agent"), "{manifest}: {command}");
            commands += 1;
        }
    }
    assert!(commands > 2, "the probes are commands");
}

/// The security model names the test behind each of its rows: `file::test` or `module::test`.
#[test]
fn security_model_names_tests_that_are_there() {
    assert_proved(&fact_rows("docs/security.md", "| attempt |"));
}

/// What the pictures name in parentheses are modules.
#[test]
fn pictures_name_modules_that_are_there() {
    let text = page("ARCHITECTURE.md");
    let pictures = text.split("```mermaid").skip(1).filter_map(|rest| rest.split("```").next());
    let mut named = BTreeSet::new();
    for part in pictures.flat_map(|picture| picture.split('(').skip(1)) {
        let Some((names, _)) = part.split_once(')') else { continue };
        named.extend(names.split(", ").map(str::to_owned));
    }
    assert!(named.len() > 10, "{named:?}");
    for name in named {
        let is_there = SOURCES.iter().any(|source| {
            let module = root().join(source).join(&name);
            module.is_dir() || module.with_extension("rs").is_file()
        });
        assert!(is_there, "no module {name}");
    }
}

/// So does each fault.
#[test]
fn faults_name_tests_that_are_there() {
    assert_proved(&fact_rows("docs/faults.md", "| fault |"));
}

/// And each invariant that a test keeps.
#[test]
fn invariants_name_tests_that_are_there() {
    let page = page("ARCHITECTURE.md");
    let rows = page.lines().skip_while(|line| *line != "| invariant | kept by |").skip(2);
    let rows: Vec<String> =
        rows.take_while(|line| line.starts_with('|')).map(str::to_owned).collect();
    assert!(rows.len() > 5, "{rows:?}");
    assert_proved(&rows);
}

/// The rows of a page's tables, without their heads, which begin with `head`.
fn fact_rows(path: &str, head: &str) -> Vec<String> {
    let page = page(path);
    let rows = page.lines().filter(|line| line.starts_with("| "));
    let facts = rows.filter(|row| !row.starts_with("| ---") && !row.starts_with(head));
    let facts: Vec<String> = facts.map(str::to_owned).collect();
    assert!(facts.len() > 20, "{facts:?}");
    facts
}

/// Asserts that the last cell of each row is one or more of `file::test` or `module::test`, and that there are such tests.
fn assert_proved(rows: &[String]) {
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

/// The README's figures, and their commits, are those of the page that its row names, which also has the command.
#[test]
fn readme_has_the_numbers_of_the_pages() {
    let readme = page("README.md");
    let rows = readme
        .lines()
        .skip_while(|line| !line.starts_with("| what | measured | as of commit |"))
        .skip(2);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 3, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, measured, of, source] = cells.as_slice() else { panic!("{row}") };
        let (commit, day) = of.split_once(", ").unwrap_or_else(|| panic!("no commit: {row}"));
        assert!(commit.len() == 7 && day.len() == 10, "{row}");
        let command = source.split('`').nth(1).unwrap_or_else(|| panic!("no command: {row}"));
        let path = source.split(['(', ')']).nth(1).unwrap_or_else(|| panic!("no page: {row}"));
        let page = page(path);
        assert!(page.contains(command), "{path} does not name {command}");
        // The simulation's page is the same whenever it is made.
        let names = |text: &str| page.contains(text);
        assert!(!names("commit ") || names(commit) && names(day), "{path} is not of {of}");
        let words = measured.split([' ', ';']);
        let numbers = words.filter(|word| word.starts_with(|c: char| c.is_ascii_digit()));
        for number in numbers.map(|word| word.trim_end_matches(',')) {
            let words = page.split(|c: char| !c.is_ascii_digit() && c != '.' && c != ',');
            let stands = words.map(|word| word.trim_matches(['.', ','])).any(|word| word == number);
            assert!(stands, "{path} has no {number}");
        }
    }
}

#[test]
fn badges_say_what_the_workspace_says() {
    let manifest = page("Cargo.toml");
    for (badge, key) in [("version", "version"), ("rust", "rust-version"), ("licence", "license")] {
        let value = manifest.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        let value = value.unwrap_or_else(|| panic!("no {key}")).trim_matches('"');
        let image = format!("docs/images/badge-{badge}.svg");
        let drawn = page(&image);
        assert!(drawn.contains(&format!("<title>{badge} {value}</title>")), "{image}: {drawn}");
        assert!(drawn.contains(&format!(">{value}</text>")), "{image}: {drawn}");
        assert!(page("README.md").contains(&format!("![{badge} {value}]({image})")), "{image}");
    }
}

/// The recipes name files, by their paths from the root.
#[test]
fn contributing_names_files_that_are_there() {
    const ENDINGS: [&str; 6] = ["json", "md", "rs", "sh", "toml", "yaml"];
    let is_path = |span: &str| {
        let ending = Path::new(span).extension().and_then(|ending| ending.to_str());
        span.contains('/') || ending.is_some_and(|ending| ENDINGS.contains(&ending))
    };
    let mut spans = spans(&page("CONTRIBUTING.md"));
    // Commands, what stands for other words, and what a build makes.
    spans.retain(|span| !span.contains([' ', '<']) && !span.starts_with("target/"));
    spans.retain(|span| is_path(span));
    assert!(spans.len() > 40, "{spans:?}");
    for path in spans {
        assert!(root().join(&path).exists(), "there is no {path} at the root");
    }
}

//! The Helm chart is described by its README, has the workspace's version, and sets flags that exist.

use xtask::values;

use super::{Complaint, Tree};

const VALUES: &str = "deploy/chart/values.yaml";
const README: &str = "deploy/chart/README.md";
const CHART: &str = "deploy/chart/Chart.yaml";
const DAEMONSET: &str = "deploy/chart/templates/daemonset.yaml";
const FLAGS: &str = "docs/flags.md";

/// Every value has a comment and is in the table; the versions are `Cargo.toml`'s; every flag is on the page of flags.
pub(super) fn chart_is_in_order(tree: &Tree) -> Vec<Complaint> {
    let text = |path: &str| tree.get(path).map_or("", |file| file.text.as_str());
    let mut complaints = Vec::new();
    match values::documented(text(README), text(VALUES)) {
        Ok(readme) if readme == text(README) => {}
        Ok(_) => complaints.push(format!(
            "{README}: the table is not that of values.yaml; `cargo xtask test chart` writes it"
        )),
        Err(error) => complaints.push(format!("{VALUES}, {README}: {error}")),
    }
    let of_key = |path, key: &str| {
        let mut found = text(path).lines().filter_map(|line| line.strip_prefix(key));
        found.next().map(|value| value.trim_matches('"').to_owned())
    };
    let version = of_key("Cargo.toml", "version = ");
    for key in ["version: ", "appVersion: "] {
        if of_key(CHART, key) != version {
            complaints.push(format!("{CHART}: `{key}` is not Cargo.toml's version"));
        }
    }
    for flag in flags(text(DAEMONSET)) {
        if !text(FLAGS).contains(&format!("`{flag}`")) {
            complaints.push(format!("{DAEMONSET}: the flag `{flag}` is not in {FLAGS}"));
        }
    }
    complaints
}

/// The flags that a template gives the agent.
fn flags(template: &str) -> Vec<&str> {
    let arguments = template.lines().filter_map(|line| {
        let line = line.trim_start().strip_prefix("- ")?;
        line.strip_prefix("{{ printf \"").unwrap_or(line).strip_prefix("--")?;
        line.split('"').find(|part| part.contains("--"))
    });
    arguments.filter_map(|argument| argument.split('=').next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str =
        "| value | default | meaning |\n| --- | --- | --- |\n| `name` | `a` | Its name |\n";

    #[test]
    fn each_fault_is_found() {
        let sound = [
            ("Cargo.toml", "version = \"0.1.0\"\n"),
            (CHART, "version: 0.1.0\nappVersion: 0.1.0\n"),
            (VALUES, "# Its name\nname: a\n"),
            (README, TABLE),
            (DAEMONSET, "- --host=a\n- {{ printf \"--level=%s\" . }}\n- name: b\n"),
            (FLAGS, "`--host` `--level`"),
        ];
        assert_eq!(chart_is_in_order(&Tree::of(&sound)), Vec::<String>::new());
        for (path, text, wanted) in [
            (CHART, "version: 0.1.0\nappVersion: 0.0.9\n", "`appVersion: ` is not"),
            (VALUES, "# Its name\nname: b\n", "the table is not"),
            (VALUES, "name: a\n", "`name` has no comment"),
            (README, "", "no `| value"),
            (FLAGS, "`--host`", "the flag `--level` is not in"),
            (FLAGS, "`--level`", "the flag `--host` is not in"),
        ] {
            let faulty = sound.map(|file| if file.0 == path { (path, text) } else { file });
            let found = chart_is_in_order(&Tree::of(&faulty));
            assert!(found.len() == 1 && found[0].contains(wanted), "{wanted}: {found:?}");
        }
    }
}

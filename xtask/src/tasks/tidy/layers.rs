//! The modules of `kiam-agent` use only modules of lower layers, as the table of `ARCHITECTURE.md` has them.

use std::collections::BTreeMap;

use super::source::{NamedPath, code, paths, production};
use super::{Complaint, File, Tree};

const TABLE: &str = "ARCHITECTURE.md";
const SOURCE: &str = "kiam-agent/src/";

/// The crates that only some modules may name, so that what they bring stays behind one door.
const OWNED: [(&[&str], &[&str]); 5] = [
    (&["aws_config", "aws_credential_types", "aws_sdk_sts", "aws_smithy_"], &["sts"]),
    (&["kube", "k8s_openapi"], &["cluster"]),
    (&["aya", "aya_log"], &["intercept"]),
    (&["netlink_packet_", "netlink_sys"], &["intercept"]),
    (
        &["hyper", "hyper_util", "http", "http_body_util"],
        &["imds", "admin", "serve", "cluster", "sts", "proxy"],
    ),
];

#[derive(Debug, PartialEq, Eq)]
struct Row {
    layer: u8,
    /// Modules of the same layer that this one may use.
    siblings: Vec<String>,
}

/// Each module is in the table, each row is a module, and no module uses one that its row does not allow.
pub(super) fn table_matches_code(tree: &Tree) -> Vec<Complaint> {
    let Some(table) = tree.get(TABLE) else {
        return vec![format!("{TABLE} is not there: it has the table of layers")];
    };
    let rows = rows(&table.text);
    let mut complaints = Vec::new();
    for name in rows.keys().filter(|name| modules(tree).all(|(module, _)| module != name.as_str()))
    {
        complaints.push(format!("{TABLE}: the table has `{name}`, which is no module of {SOURCE}"));
    }
    for (module, file) in modules(tree) {
        match rows.get(module) {
            Some(row) => complaints.extend(uses_not_allowed(module, row, file, &rows)),
            None => complaints.push(format!("{}: {TABLE} has no row for `{module}`", file.path)),
        }
    }
    complaints
}

fn uses_not_allowed(
    module: &str,
    row: &Row,
    file: &File,
    rows: &BTreeMap<String, Row>,
) -> Vec<Complaint> {
    let code = code(production(&file.path, &file.text));
    let mut complaints = Vec::new();
    for path in paths(&code) {
        for &used in from_crate_root(&path, &file.path) {
            let allowed = used == module
                || rows.get(used).is_none_or(|other| {
                    other.layer < row.layer || row.siblings.iter().any(|sibling| sibling == used)
                });
            if !allowed {
                complaints.push(format!(
                    "{}:{}: `{module}` may not use `{used}`, which is not of a lower layer than {} (see {TABLE})",
                    file.path, path.line, row.layer
                ));
            }
        }
    }
    complaints
}

/// The modules that a path names from the crate's root; `super::` in a file right below the root does that too.
fn from_crate_root<'a>(path: &'a NamedPath<'_>, file: &str) -> &'a [&'a str] {
    let inside = file.trim_start_matches(SOURCE).trim_end_matches("/mod.rs");
    let at_root = path.first == "crate" || (path.first == "super" && !inside.contains('/'));
    if at_root { &path.next } else { &[] }
}

/// No crate is named outside the modules that it is for.
pub(super) fn crates_stay_in_their_module(tree: &Tree) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    for (module, file) in modules(tree) {
        let code = code(production(&file.path, &file.text));
        for path in paths(&code) {
            let owner =
                OWNED.iter().find(|(crates, _)| crates.iter().any(|name| names(path.first, name)));
            if let Some((_, owners)) = owner
                && !owners.contains(&module)
            {
                complaints.push(format!(
                    "{}:{}: only {} may name `{}`",
                    file.path,
                    path.line,
                    owners.join(", "),
                    path.first
                ));
            }
        }
    }
    complaints
}

/// Whether `first` is the crate, or one of those whose names begin so (with a `_` at the end).
fn names(first: &str, name: &str) -> bool {
    first == name || (name.ends_with('_') && first.starts_with(name))
}

/// Every file of a module, with the module's name; the crate's roots belong to none.
fn modules(tree: &Tree) -> impl Iterator<Item = (&str, &File)> {
    tree.rust().filter_map(|file| {
        let inside = file.path.strip_prefix(SOURCE)?;
        let module = inside.split('/').next()?.trim_end_matches(".rs");
        (!matches!(module, "lib" | "main")).then_some((module, file))
    })
}

/// Rows look like "| 1 | `policy` | What it does. | `pods` |".
fn rows(text: &str) -> BTreeMap<String, Row> {
    text.lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.strip_prefix('|')?.split('|').map(str::trim).collect();
            let [layer, module, _, siblings, ..] = cells[..] else { return None };
            let module = module.strip_prefix('`')?.strip_suffix('`')?;
            let siblings = siblings.split(',').map(|name| name.trim().trim_matches('`').to_owned());
            let siblings = siblings.filter(|name| !name.is_empty()).collect();
            Some((module.to_owned(), Row { layer: layer.parse().ok()?, siblings }))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: &str = "| layer | module | one sentence | of its own layer |\n| --: | --- | --- | --- |\n\
                        | 0 | `clock` | Time. | |\n| 1 | `pods` | Which. | |\n| 1 | `policy` | May. | `pods` |\n";

    fn complaints(files: &[(&str, &str)]) -> Vec<Complaint> {
        let all = [
            ("ARCHITECTURE.md", ROWS),
            ("kiam-agent/src/lib.rs", "pub mod clock; use crate::policy::X;"),
            ("kiam-agent/src/clock.rs", ""),
            ("kiam-agent/src/pods/mod.rs", "use crate::clock::Clock; mod index;"),
            ("kiam-agent/src/policy/mod.rs", "use crate::{clock::Clock, pods::Pod, policy::rule};"),
        ];
        let all: Vec<_> = all.iter().chain(files).copied().collect();
        let tree = Tree::of(&all);
        [table_matches_code(&tree), crates_stay_in_their_module(&tree)].concat()
    }

    #[test]
    fn uses_of_lower_layers_and_named_siblings_are_allowed() {
        assert_eq!(complaints(&[]), Vec::<String>::new());
    }

    #[test]
    fn each_breach_is_found() {
        let cases = [
            (
                "pods/index.rs",
                "\nuse crate::policy::Rule;",
                "pods/index.rs:2: `pods` may not use `policy`",
            ),
            ("pods/index.rs", "fn a() { crate::policy::x() }", "`pods` may not use `policy`"),
            (
                "pods/index.rs",
                "use crate::{clock::Clock, policy::{A, B}};",
                "`pods` may not use `policy`",
            ),
            ("pods.rs", "use super::policy::Rule;", "`pods` may not use `policy`"),
            ("clock/x.rs", "use crate::pods::Pod;", "`clock` may not use `pods`"),
            ("extra/mod.rs", "", "no row for `extra`"),
            ("pods/x.rs", "use aya::Ebpf;", "only intercept may name `aya`"),
            ("pods/x.rs", "use aws_smithy_types::X;", "only sts may name `aws_smithy_types`"),
            ("pods/x.rs", "fn a(x: kube::Client) {}", "only cluster may name `kube`"),
            (
                "pods/x.rs",
                "use http;",
                "only imds, admin, serve, cluster, sts, proxy may name `http`",
            ),
        ];
        for (path, text, wanted) in cases {
            let found = complaints(&[(&format!("kiam-agent/src/{path}"), text)]);
            assert!(found.iter().any(|complaint| complaint.contains(wanted)), "{text}: {found:?}");
        }
    }

    #[test]
    fn tests_and_children_may_say_super() {
        let inner = "use super::policy; // the module's own\n#[cfg(test)]\nmod tests {\nuse crate::policy::X;\n}";
        assert_eq!(complaints(&[("kiam-agent/src/pods/inner.rs", inner)]), Vec::<String>::new());
    }

    #[test]
    fn row_without_a_module_is_found() {
        let tree = Tree::of(&[("ARCHITECTURE.md", ROWS)]);
        assert!(table_matches_code(&tree)[0].contains("`clock`, which is no module"));
    }
}

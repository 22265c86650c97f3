//! Rules about single files.

use super::source::{code, production};
use super::{Complaint, File, Tree};

const MOST_LINES: usize = 400;

/// Which files of the agent may list folders.
const LISTS_FOLDERS: [&str; 8] = [
    // The walker.
    "kiam-agent/kernel/src/sys/walk.rs",
    // The state folder and the pins, which are root's.
    "kiam-agent/src/admin/unix.rs",
    "kiam-agent/src/uninstall/state.rs",
    "kiam-agent/requests/src/imds/key.rs",
    "kiam-agent/kernel/src/guard/uplink.rs",
    "kiam-agent/kernel/src/pins/mod.rs",
    // Cgroups, on threads of their own: up to pods' containers, and with limits of its own.
    "kiam-agent/kernel/src/sandboxes/watch.rs",
    "kiam-agent/kernel/src/sandboxes/processes.rs",
];

/// What only one of the agent's modules may name, so that it stays behind one door; what crates may name of each other,
/// the compiler checks.
const DOORS: [(&str, &[&str]); 6] = [
    ("aws_config::", &["sts"]),
    ("aws_sdk_sts::", &["sts"]),
    ("kube::", &["cluster"]),
    ("k8s_openapi::", &["cluster"]),
    ("crate::app", &["app"]),
    ("crate::config", &["app", "config", "ctl", "preflight"]),
];

/// Files keep to a size that one reads in one go; tests don't count.
pub(super) fn no_file_is_too_long(tree: &Tree) -> Vec<Complaint> {
    let length = |file: &File| production(&file.path, &file.text).lines().count();
    tree.rust()
        .filter(|file| length(file) >= MOST_LINES)
        .map(|file| {
            let lines = length(file);
            format!(
                "{}: {lines} lines before the tests, at most {MOST_LINES}: find the second noun",
                file.path
            )
        })
        .collect()
}

/// A path of the agent's code that begins with a name of [`DOORS`] is in a module that may have it.
pub(super) fn edges_keep_to_themselves(tree: &Tree) -> Vec<Complaint> {
    let edges = tree.rust().filter_map(|file| {
        let inside = file.path.strip_prefix("kiam-agent/src/")?;
        Some((inside.split('/').next()?.trim_end_matches(".rs"), file))
    });
    let mut complaints = Vec::new();
    for (module, file) in edges {
        let code = code(production(&file.path, &file.text));
        for (name, owners) in DOORS.iter().filter(|(_, owners)| !owners.contains(&module)) {
            let grouped = name.strip_prefix("crate::").is_some_and(|module| {
                let groups = code.split("use crate::{").skip(1);
                groups.filter_map(|group| group.split(';').next()).any(|group| {
                    let mut names = group.split(|c: char| !c.is_alphanumeric() && c != '_');
                    names.any(|name| name == module)
                })
            });
            if grouped || code.contains(name) {
                let owners = owners.join(", ");
                complaints.push(format!("{}: only {owners} may name `{name}`", file.path));
            }
        }
    }
    complaints
}

/// Folders are listed only where nobody but the node and the agent decides what is in them; cgroups by the walker, which
/// has an end.
pub(super) fn folders_are_listed_where_tenants_make_none(tree: &Tree) -> Vec<Complaint> {
    let others = tree.rust().filter(|file| {
        (file.path.starts_with("kiam-agent/") && file.path.contains("/src/"))
            && !LISTS_FOLDERS.iter().any(|path| file.path == *path)
    });
    let complaint = |file: &File, line| {
        format!(
            "{}:{line}: `read_dir` has no end where tenants make the entries; use `sys::Walk`",
            file.path
        )
    };
    others
        .flat_map(|file| {
            let production = File {
                path: file.path.clone(),
                text: production(&file.path, &file.text).to_owned(),
            };
            let lines: Vec<_> = lines_with(&production, "read_dir").collect();
            lines.into_iter().map(move |line| complaint(file, line))
        })
        .collect()
}

/// A test that does not run is worth nothing.
pub(super) fn no_test_is_ignored(tree: &Tree) -> Vec<Complaint> {
    let lines = |file: &File| lines_with(file, "ignore").collect::<Vec<_>>();
    tree.rust()
        .flat_map(|file| lines(file).into_iter().map(move |line| (file, line)))
        .filter(|(file, line)| {
            let text = file.text.lines().nth(line - 1).unwrap_or_default().trim_start();
            text.starts_with("#[ignore")
        })
        .map(|(file, line)| {
            format!("{}:{line}: an ignored test; fix it, or let it skip with a reason", file.path)
        })
        .collect()
}

/// The lines of a file whose code has this word.
fn lines_with(file: &File, word: &str) -> impl Iterator<Item = usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let code = code(&file.text);
    let lines = code
        .lines()
        .enumerate()
        .filter(|(_, line)| line.split(|c| !is_word(c)).any(|part| part == word));
    lines.map(|(index, _)| index + 1).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_found(check: fn(&Tree) -> Vec<Complaint>, path: &str, text: &str) -> bool {
        !check(&Tree::of(&[(path, text)])).is_empty()
    }

    #[test]
    fn long_file_is_found_and_tests_do_not_count() {
        let long = "\n".repeat(400);
        assert!(is_found(no_file_is_too_long, "a.rs", &long));
        let tests = format!("fn a() {{}}\n#[cfg(test)]\nmod tests {{{long}}}");
        assert!(!is_found(no_file_is_too_long, "a.rs", &tests));
    }

    #[test]
    fn what_has_an_owner_is_found_elsewhere() {
        for (path, text, found) in [
            ("imds/mod.rs", "use kube::Client;", true),
            ("imds/mod.rs", "fn a(x: kube::Client) {}", true),
            ("cluster/watch.rs", "use kube::Client;", false),
            ("serve/mod.rs", "use crate::app::Readiness;", true),
            ("serve/mod.rs", "use crate::{\n    app::Readiness,\n};", true),
            ("app/start.rs", "use crate::config::Config;", false),
            ("imds/mod.rs", "// kube::Client\n#[cfg(test)]\nmod tests {\n use kube::A;\n}", false),
        ] {
            let path = format!("kiam-agent/src/{path}");
            assert_eq!(is_found(edges_keep_to_themselves, &path, text), found, "{path}: {text}");
        }
    }

    #[test]
    fn folders_listed_elsewhere_are_found() {
        let check = folders_are_listed_where_tenants_make_none;
        for (path, text, found) in [
            ("kiam-agent/kernel/src/sys/cgroup.rs", "for entry in fs::read_dir(path)? {}", true),
            ("kiam-agent/requests/src/imds/mod.rs", "path.read_dir()", true),
            ("kiam-agent/kernel/src/sys/walk.rs", "fs::read_dir(path)", false),
            (
                "kiam-agent/requests/src/imds/mod.rs",
                "#[cfg(test)]\nmod tests {\nfn a() { read_dir(); }\n}",
                false,
            ),
            ("kiam-agent/tests/a.rs", "fs::read_dir(path)", false),
        ] {
            assert_eq!(is_found(check, path, text), found, "{path}: {text}");
        }
    }

    #[test]
    fn ignored_test_is_found() {
        assert!(is_found(no_test_is_ignored, "a.rs", "#[test]\n#[ignore = \"slow\"]\nfn a() {}"));
        assert!(!is_found(no_test_is_ignored, "a.rs", "// #[ignore]\nlet ignore = 1;"));
    }
}

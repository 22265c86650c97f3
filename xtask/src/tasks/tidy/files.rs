//! Rules about single files.

use std::path::{Component, Path, PathBuf};

use super::source::{code, production};
use super::{Complaint, File, Tree};

const MOST_LINES: usize = 400;

/// Which files of the agent may list folders.
const LISTS_FOLDERS: [&str; 7] = [
    // The walker.
    "kiam-agent/src/intercept/walk.rs",
    // The state folder and the pins, which are root's.
    "kiam-agent/src/admin/unix.rs",
    "kiam-agent/src/imds/key.rs",
    "kiam-agent/src/intercept/guard/uplink.rs",
    "kiam-agent/src/intercept/pins.rs",
    // Cgroups, on threads of their own: up to pods' containers, and with limits of its own.
    "kiam-agent/src/sandboxes/watch.rs",
    "kiam-agent/src/sandboxes/processes.rs",
];

/// Where `unsafe` is expected: calls into the kernel, and the kernel program itself. Elsewhere it needs a better idea.
const UNSAFE: [&str; 7] = [
    "kiam-agent/src/identity/",
    "kiam-agent/src/intercept/",
    "kiam-agent/src/realtime.rs",
    "kiam-common/src/",
    "kiam-ebpf/src/",
    "xtask/src/lab/",
    "xtask/src/pod_client/attack/",
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

/// `unsafe` is only where it is expected.
pub(super) fn unsafe_is_where_it_is_expected(tree: &Tree) -> Vec<Complaint> {
    let unexpected =
        tree.rust().filter(|file| !UNSAFE.iter().any(|path| file.path.starts_with(path)));
    let complaint = |file: &File, line| {
        format!(
            "{}:{line}: `unsafe` is only for {}; use rustix or aya here",
            file.path,
            UNSAFE.join(", ")
        )
    };
    unexpected
        .flat_map(|file| lines_with(file, "unsafe").map(move |line| complaint(file, line)))
        .collect()
}

/// Folders are listed only where nobody but the node and the agent decides what is in them; cgroups by the walker, which
/// has an end.
pub(super) fn folders_are_listed_where_tenants_make_none(tree: &Tree) -> Vec<Complaint> {
    let others = tree.rust().filter(|file| {
        file.path.starts_with("kiam-agent/src/")
            && !LISTS_FOLDERS.iter().any(|path| file.path == *path)
    });
    let complaint = |file: &File, line| {
        format!(
            "{}:{line}: `read_dir` has no end where tenants make the entries; use `intercept::Walk`",
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

/// Nothing rests on one machine's folders or on the registry that it happens to use.
pub(super) fn nothing_names_one_machine(tree: &Tree) -> Vec<Complaint> {
    const FOLDERS: [&str; 5] = ["farm", "home", "opt/wheels", "root", "work"];
    const HOSTS: [&str; 6] = [
        "index.crates",
        "static.crates",
        "pypi.org",
        "pythonhosted",
        "deb.debian",
        "registry.npmjs",
    ];
    let folders = FOLDERS.map(|folder| format!("/{folder}/"));
    let mut complaints = Vec::new();
    // This file has the words, as words.
    for file in tree.files.iter().filter(|file| file.path != "xtask/src/tasks/tidy/files.rs") {
        for (index, line) in file.text.lines().enumerate() {
            let found =
                folders.iter().find(|folder| starts_a_path(line, folder)).map(String::as_str);
            if let Some(word) = found.or_else(|| HOSTS.into_iter().find(|host| line.contains(host)))
            {
                complaints.push(format!(
                    "{}:{}: `{word}` is of one machine only",
                    file.path,
                    index + 1
                ));
            }
        }
    }
    complaints
}

fn starts_a_path(line: &str, folder: &str) -> bool {
    let continues = |c: char| c.is_alphanumeric() || "._-~}*)".contains(c);
    line.match_indices(folder).any(|(at, _)| !line[..at].ends_with(continues))
}

/// Relative links of the documents lead to files that are there.
pub(super) fn links_lead_somewhere(tree: &Tree) -> Vec<Complaint> {
    let documents = tree.files.iter().filter(|file| file.path.ends_with(".md"));
    documents.flat_map(|file| dead_links(file, tree)).collect()
}

fn dead_links(file: &File, tree: &Tree) -> Vec<Complaint> {
    let folder = Path::new(&file.path).parent().unwrap_or(Path::new(""));
    let links = file.text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
    let relative = links.map(|link| link.split('#').next().unwrap_or_default());
    let relative = relative.filter(|link| !link.is_empty() && !link.contains(':'));
    let leads_nowhere = |link: &&str| {
        let wanted = normal(&folder.join(link));
        let inside = |path: &str| path == wanted || path.starts_with(&format!("{wanted}/"));
        !tree.files.iter().any(|file| inside(&file.path))
    };
    relative
        .filter(leads_nowhere)
        .map(|link| format!("{}: the link to `{link}` leads nowhere", file.path))
        .collect()
}

fn normal(path: &Path) -> String {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                normal.pop();
            }
            Component::Normal(name) => normal.push(name),
            _ => {}
        }
    }
    normal.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_found(check: fn(&Tree) -> Vec<Complaint>, path: &str, text: &str) -> bool {
        !check(&Tree::of(&[("README.md", ""), ("docs/a.md", ""), (path, text)])).is_empty()
    }

    #[test]
    fn long_file_is_found_and_tests_do_not_count() {
        let long = "\n".repeat(400);
        assert!(is_found(no_file_is_too_long, "a.rs", &long));
        let tests = format!("fn a() {{}}\n#[cfg(test)]\nmod tests {{{long}}}");
        assert!(!is_found(no_file_is_too_long, "a.rs", &tests));
    }

    #[test]
    fn unsafe_is_found_in_code_outside_its_places() {
        for (path, text, found) in [
            ("kiam-agent/src/imds/mod.rs", "unsafe { x() }", true),
            ("kiam-agent/src/intercept/link.rs", "unsafe { x() }", false),
            ("kiam-agent/src/imds/mod.rs", "#![forbid(unsafe_code)] // no unsafe", false),
        ] {
            assert_eq!(
                is_found(unsafe_is_where_it_is_expected, path, text),
                found,
                "{path}: {text}"
            );
        }
    }

    #[test]
    fn folders_listed_elsewhere_are_found() {
        let check = folders_are_listed_where_tenants_make_none;
        for (path, text, found) in [
            ("kiam-agent/src/intercept/cgroup.rs", "for entry in fs::read_dir(path)? {}", true),
            ("kiam-agent/src/imds/mod.rs", "path.read_dir()", true),
            ("kiam-agent/src/intercept/walk.rs", "fs::read_dir(path)", false),
            (
                "kiam-agent/src/imds/mod.rs",
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

    #[test]
    fn names_of_one_machine_are_found() {
        for (text, found) in [
            ("see /work/x", true),
            ("`/root/.cargo`", true),
            ("\"/home/me\"", true),
            ("https://static.crates.io/x", true),
            ("kiam-agent/work/x and ./root/y", false),
            ("registry+https://github.com/rust-lang/crates.io-index", false),
        ] {
            assert_eq!(is_found(nothing_names_one_machine, "x.md", text), found, "{text}");
        }
    }

    #[test]
    fn dead_link_is_found() {
        for (text, found) in [
            ("[a](docs/a.md)", false),
            ("[a](docs/)", false),
            ("[a](docs/b.md)", true),
            ("[a](https://example.com/b.md) and [b](#here)", false),
            ("[a](docs/a.md#part) [b](nothing.md#part)", true),
        ] {
            assert_eq!(is_found(links_lead_somewhere, "x.md", text), found, "{text}");
        }
        assert!(!is_found(links_lead_somewhere, "docs/b.md", "[a](../README.md) [b](a.md)"));
    }
}

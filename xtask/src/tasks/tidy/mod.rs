//! `cargo xtask tidy`: rules of this repository that no compiler checks. Each check is a pure function of the [`Tree`],
//! and says where the rule is broken and what to do.

mod chart;
mod deploy;
mod files;
mod pages;
mod source;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use xtask::command::{say, workspace};

/// The text files of the repository.
struct Tree {
    files: Vec<File>,
}

struct File {
    /// Relative to the repository, with `/`.
    path: String,
    text: String,
}

/// A rule that is broken at some place.
type Complaint = String;

/// Checks the repository, and fails with every complaint there is.
pub(crate) fn run() -> Result<()> {
    let tree = Tree::read(workspace())?;
    let complaints = check(&tree);
    for complaint in &complaints {
        say(complaint);
    }
    if !complaints.is_empty() {
        bail!("tidy: {} complaints", complaints.len());
    }
    say(format!("tidy: {} files are in order", tree.files.len()));
    Ok(())
}

fn check(tree: &Tree) -> Vec<Complaint> {
    let checks: [fn(&Tree) -> Vec<Complaint>; 8] = [
        files::no_file_is_too_long,
        files::edges_keep_to_themselves,
        files::folders_are_listed_where_tenants_make_none,
        files::no_test_is_ignored,
        pages::links_lead_somewhere,
        pages::summary_lists_each_document,
        deploy::manifests_are_sound,
        chart::chart_is_in_order,
    ];
    checks.iter().flat_map(|check| check(tree)).collect()
}

// === impl Tree ===

impl Tree {
    fn read(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        read_folder(root, "", &mut files)?;
        files.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(Self { files })
    }

    fn get(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    fn rust(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.path.ends_with(".rs"))
    }

    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Self {
        let file =
            |(path, text): &(&str, &str)| File { path: (*path).into(), text: (*text).into() };
        Self { files: files.iter().map(file).collect() }
    }
}

/// Reads what is under version control or could be: no build results, no binary files.
fn read_folder(root: &Path, folder: &str, files: &mut Vec<File>) -> Result<()> {
    const LEFT_OUT: [&str; 4] = [".git", "__pycache__", "kiam-ebpf/out", "target"];
    let entries =
        fs::read_dir(root.join(folder)).with_context(|| format!("cannot list {folder}"))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {folder}"))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        if LEFT_OUT.contains(&name.as_str()) || LEFT_OUT.contains(&path.as_str()) {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            read_folder(root, &path, files)?;
        } else if let Ok(text) = fs::read_to_string(entry.path()) {
            files.push(File { path, text });
        }
    }
    Ok(())
}

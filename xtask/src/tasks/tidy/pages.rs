//! The documents lead somewhere, and the book has all of them.

use std::collections::BTreeMap;

use xtask::markdown::{anchors, is_relative, links, resolved};

use super::{Complaint, File, Tree};

/// The order of the book, which `cargo xtask book` builds.
pub(super) const SUMMARY: &str = "docs/SUMMARY.md";

/// Relative links of the documents lead to files that are there, and to headings that those have.
pub(super) fn links_lead_somewhere(tree: &Tree) -> Vec<Complaint> {
    documents(tree).flat_map(|file| dead_links(file, tree)).collect()
}

/// The summary lists each document once, and nothing else.
pub(super) fn summary_lists_each_document(tree: &Tree) -> Vec<Complaint> {
    let Some(summary) = tree.get(SUMMARY) else {
        return vec![format!("{SUMMARY} is not there: it orders the pages of the book")];
    };
    let mut listed: BTreeMap<String, u32> = BTreeMap::new();
    for link in links(&summary.text) {
        *listed.entry(resolved(SUMMARY, link)).or_default() += 1;
    }
    let mut complaints = Vec::new();
    for file in documents(tree).filter(|file| file.path != SUMMARY) {
        match listed.remove(&file.path) {
            Some(1) => {}
            Some(times) => complaints.push(format!("{SUMMARY}: lists {} {times} times", file.path)),
            None => complaints
                .push(format!("{}: not in {SUMMARY}; list it below its reader", file.path)),
        }
    }
    let others = listed.keys().map(|path| format!("{SUMMARY}: {path} is no page of the book"));
    complaints.extend(others);
    complaints
}

fn documents(tree: &Tree) -> impl Iterator<Item = &File> {
    tree.files.iter().filter(|file| file.path.ends_with(".md"))
}

fn dead_links(file: &File, tree: &Tree) -> Vec<Complaint> {
    let relative = links(&file.text).into_iter().filter(|link| is_relative(link));
    let complaint = |link: &str| {
        let path = resolved(&file.path, link);
        let inside = |other: &str| other == path || other.starts_with(&format!("{path}/"));
        if !tree.files.iter().any(|other| inside(&other.path)) {
            return Some(format!("{}: the link to `{link}` leads nowhere", file.path));
        }
        let (_, anchor) = link.split_once('#')?;
        let page = tree.get(&path).filter(|page| page.path.ends_with(".md"))?;
        let is_there = anchors(&page.text).iter().any(|other| other == anchor);
        (!is_there).then(|| format!("{}: `{link}`: {path} has no heading `{anchor}`", file.path))
    };
    relative.filter_map(complaint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_link_is_found() {
        for (text, found) in [
            ("[a](docs/a.md)", false),
            ("[a](docs/)", false),
            ("[a](docs/b.md)", true),
            ("[a](https://example.com/b.md)", false),
            ("[a](docs/a.md#part) [b](nothing.md#part)", true),
            ("# Here\n[a](#here) [b](docs/a.md#a-part)", false),
            ("[a](#here)", true),
            ("[a](docs/a.md#b-part)", true),
            ("`[a](docs/b.md)`", false),
        ] {
            let files = [("README.md", ""), ("docs/a.md", "## A part\n## Part\n"), ("x.md", text)];
            let complaints = links_lead_somewhere(&Tree::of(&files));
            assert_eq!(!complaints.is_empty(), found, "{text}: {complaints:?}");
        }
        let up = [("README.md", ""), ("docs/a.md", "[a](../README.md) [b](a.md) [c](..)")];
        let complaints = links_lead_somewhere(&Tree::of(&up));
        assert_eq!(complaints, ["docs/a.md: the link to `..` leads nowhere"]);
    }

    #[test]
    fn page_that_the_book_lacks_or_has_twice_is_found() {
        let cases = [
            ("- [a](a.md)\n- [r](../README.md)\n", None),
            ("- [r](../README.md)\n", Some("docs/a.md: not in docs/SUMMARY.md")),
            ("- [a](a.md)\n- [a](a.md)\n- [r](../README.md)\n", Some("lists docs/a.md 2 times")),
            ("- [a](a.md)\n- [b](b.md)\n- [r](../README.md)\n", Some("docs/b.md is no page")),
        ];
        for (summary, wanted) in cases {
            let files = [("README.md", ""), ("docs/a.md", ""), (SUMMARY, summary)];
            let found = summary_lists_each_document(&Tree::of(&files));
            assert_eq!(found.len(), usize::from(wanted.is_some()), "{summary}: {found:?}");
            assert!(found.iter().all(|it| it.contains(wanted.unwrap())), "{summary}: {found:?}");
        }
        assert_eq!(summary_lists_each_document(&Tree::of(&[])).len(), 1);
    }
}

//! Just enough of Markdown to check the documents and to move them: blocks of code, links, and the anchors of headings.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

const FENCE: &str = "```";

/// A fenced block of code.
#[derive(Debug, PartialEq, Eq)]
pub struct Block<'a> {
    /// What stands behind the opening fence.
    pub language: &'a str,
    /// The line of the page on which the text begins, from 1.
    pub line: usize,
    /// The lines between the fences.
    pub text: &'a str,
}

/// Code in a page: a fenced block, or a span in backquotes.
struct Code {
    range: Range<usize>,
    fenced: bool,
}

/// The fenced blocks of a page, in order.
#[must_use]
pub fn blocks(page: &str) -> Vec<Block<'_>> {
    let fenced = code(page).into_iter().filter(|code| code.fenced);
    let block = |code: Code| {
        let whole = &page[code.range.clone()];
        let (head, text) = whole.split_once('\n')?;
        let text = text.trim_end().strip_suffix(FENCE).unwrap_or(text);
        let line = page[..code.range.start].lines().count() + 2;
        Some(Block { language: head.trim_start().trim_start_matches('`'), line, text })
    };
    fenced.filter_map(block).collect()
}

/// What stands in backquotes outside the blocks, on one line each.
#[must_use]
pub fn spans(page: &str) -> Vec<String> {
    let spans = code(page).into_iter().filter(|code| !code.fenced);
    let text = |code: Code| page[code.range].trim_matches('`').trim().to_owned();
    spans.map(|code| text(code).split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// Where the links of a page lead: URLs, paths, anchors.
#[must_use]
pub fn links(page: &str) -> Vec<&str> {
    targets(page).into_iter().map(|range| &page[range]).collect()
}

/// The page with other targets for those links for which `other` has one.
#[must_use]
pub fn with_links(page: &str, other: impl Fn(&str) -> Option<String>) -> String {
    let mut text = String::with_capacity(page.len());
    let mut done = 0;
    for range in targets(page) {
        if let Some(target) = other(&page[range.clone()]) {
            text += &page[done..range.start];
            text += &target;
            done = range.end;
        }
    }
    text + &page[done..]
}

/// The anchors of a page's headings, as code hosts and mdBook make them.
#[must_use]
pub fn anchors(page: &str) -> Vec<String> {
    let fences: Vec<_> = code(page).into_iter().filter(|code| code.fenced).collect();
    let mut taken = BTreeMap::new();
    let mut found = Vec::new();
    let mut at = 0;
    for line in page.split_inclusive('\n') {
        let begin = at;
        at += line.len();
        if !line.starts_with('#') || fences.iter().any(|code| code.range.contains(&begin)) {
            continue;
        }
        let anchor = anchor(line.trim_start_matches('#').trim());
        let times: &mut u32 = taken.entry(anchor.clone()).or_default();
        found.push(if *times == 0 { anchor } else { format!("{anchor}-{times}") });
        *times += 1;
    }
    found
}

/// The path, from the root, to which a link of the page at `path` leads, without its anchor.
#[must_use]
pub fn resolved(path: &str, link: &str) -> String {
    let link = link.split('#').next().unwrap_or_default();
    if link.is_empty() {
        return path.to_owned();
    }
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut normal = PathBuf::new();
    for component in folder.join(link).components() {
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

/// Whether a link leads to something of the repository, not to another site.
#[must_use]
pub fn is_relative(link: &str) -> bool {
    !link.contains(':')
}

fn anchor(heading: &str) -> String {
    // Of a link, the text.
    let mut text = String::new();
    let mut parts = heading.split("](");
    text += parts.next().unwrap_or_default();
    for part in parts {
        text += part.split_once(')').map_or("", |(_, rest)| rest);
    }
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let kept = text.chars().filter(kept).map(|c| if c == ' ' { '-' } else { c });
    kept.flat_map(char::to_lowercase).collect()
}

/// The targets of the links, in order: what is in the parentheses, without a title.
fn targets(page: &str) -> Vec<Range<usize>> {
    let code = code(page);
    let is_code = |at: usize| code.iter().any(|code| code.range.contains(&at));
    let starts = page.match_indices("](").map(|(at, text)| (at, at + text.len()));
    let targets = starts.filter(|(at, _)| !is_code(*at)).map(|(_, start)| {
        let length = page[start..].find([')', ' ', '\n']).unwrap_or(page.len() - start);
        start..start + length
    });
    targets.collect()
}

fn code(page: &str) -> Vec<Code> {
    let bytes = page.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let begins_line = at == 0 || bytes[at - 1] == b'\n';
        let code = if begins_line && is_fence(&page[at..]) {
            Some(Code { range: at..end_of_block(page, at), fenced: true })
        } else if bytes[at] == b'`' {
            end_of_span(page, at).map(|end| Code { range: at..end, fenced: false })
        } else {
            None
        };
        match code {
            Some(code) => {
                at = code.range.end;
                found.push(code);
            }
            None => at += 1,
        }
    }
    found
}

fn is_fence(line: &str) -> bool {
    line.trim_start_matches(' ').starts_with(FENCE)
}

/// The end of the closing fence's line, or of the page.
fn end_of_block(page: &str, begin: usize) -> usize {
    let mut end = begin;
    for (index, line) in page[begin..].split_inclusive('\n').enumerate() {
        end += line.len();
        if index > 0 && is_fence(line) {
            break;
        }
    }
    end
}

/// The end of a span that begins here, if it ends in the same paragraph by as many backquotes.
fn end_of_span(page: &str, begin: usize) -> Option<usize> {
    let rest = &page[begin..];
    let quotes = &rest[..rest.len() - rest.trim_start_matches('`').len()];
    let paragraph = rest.split("\n\n").next().unwrap_or(rest);
    let end = paragraph.get(quotes.len()..)?.find(quotes)?;
    Some(begin + quotes.len() + end + quotes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# A `b` [c](d.md)\n\n[e `]( `](f.md#g \"t\") `[no](h)`\n\n```sh\n# no\ni [no](j)\n```\n\n## A b c\n";

    #[test]
    fn blocks_have_their_language_and_line() {
        let block = Block { language: "sh", line: 6, text: "# no\ni [no](j)\n" };
        assert_eq!(blocks(PAGE), [block]);
        let open = "a\n```\nb\n";
        assert_eq!(blocks(open), [Block { language: "", line: 3, text: "b\n" }]);
    }

    #[test]
    fn links_in_code_are_none() {
        assert_eq!(links(PAGE), ["d.md", "f.md#g"]);
        assert_eq!(spans(PAGE), ["b", "](", "[no](h)"]);
        let moved = with_links(PAGE, |link| (link == "d.md").then(|| "x/d.md".to_owned()));
        assert_eq!(moved, PAGE.replace("(d.md)", "(x/d.md)"));
    }

    #[test]
    fn lonely_backquote_quotes_nothing() {
        assert_eq!(links("a ` b\n\n[c](d) ` `"), ["d"]);
    }

    #[test]
    fn anchors_are_those_of_code_hosts() {
        assert_eq!(anchors(PAGE), ["a-b-c", "a-b-c-1"]);
        let page = "## 1. The nodes\n## How to add …\n## `--mode=observe`: what it does\n";
        assert_eq!(anchors(page), ["1-the-nodes", "how-to-add-", "--modeobserve-what-it-does"]);
    }

    #[test]
    fn links_are_resolved_from_their_page() {
        for (path, link, wanted) in [
            ("README.md", "docs/a.md#b", "docs/a.md"),
            ("docs/a.md", "../README.md", "README.md"),
            ("docs/a.md", "#b", "docs/a.md"),
            ("docs/a.md", "b.md", "docs/b.md"),
            ("docs/a.md", "../deploy/", "deploy"),
            ("docs/a.md", "../../../b.md", "b.md"),
        ] {
            assert_eq!(resolved(path, link), wanted, "{path}: {link}");
        }
    }
}

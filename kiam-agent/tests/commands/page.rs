//! The commands of the documents: what stands in their blocks of `sh` and `console`.

use std::fs;

use xtask::{
    command::workspace,
    markdown::{blocks, links, resolved},
};

/// It lists the documents: `cargo xtask tidy` sees to that.
const SUMMARY: &str = "docs/SUMMARY.md";
/// Languages of blocks that have no commands.
const OTHERS: [&str; 5] = ["ini", "json", "mermaid", "text", "yaml"];
const MARK: &str = "(not run";

/// A command of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command {
    /// `page:line`.
    pub(super) place: String,
    /// On one line, if its quotes allow that, and without comments.
    pub(super) text: String,
    /// What the page says of why nobody ran it, if nobody did.
    pub(super) not_run: Option<String>,
}

/// Every document but the summary.
pub(super) fn pages() -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(workspace().join(path)).unwrap();
    let summary = read(SUMMARY);
    let paths = links(&summary).into_iter().map(|link| resolved(SUMMARY, link));
    paths.map(|path| (path.clone(), read(&path))).collect()
}

/// Every command of every page.
pub(super) fn commands() -> Vec<Command> {
    pages().iter().flat_map(|(path, page)| of_page(path, page)).collect()
}

/// The commands of one page.
pub(super) fn of_page(path: &str, page: &str) -> Vec<Command> {
    let mut found = Vec::new();
    for block in blocks(page) {
        let place = |line: usize| format!("{path}:{}", block.line + line);
        match block.language {
            "sh" => found.extend(of_script(block.text, place)),
            // The rest is what the commands print.
            "console" => found.extend(block.text.lines().enumerate().filter_map(|(line, text)| {
                Some(Command {
                    place: place(line),
                    text: text.strip_prefix("$ ")?.to_owned(),
                    not_run: None,
                })
            })),
            other => assert!(
                OTHERS.contains(&other),
                "{}: a block of `{other}`: commands stand in blocks of `sh` or `console`",
                place(0)
            ),
        }
    }
    found
}

fn of_script(script: &str, place: impl Fn(usize) -> String) -> Vec<Command> {
    let mut found = Vec::new();
    let mut mark_of_rest = None;
    let (mut text, mut begun) = (String::new(), 0);
    for (line, whole) in script.lines().enumerate() {
        if text.is_empty() {
            begun = line;
        }
        let (code, comment) = split_comment(&text, whole);
        let mark = mark(comment);
        // Within quotes, spaces count.
        text += if quote(&text).is_some() { code } else { code.trim_start() };
        if quote(&text).is_some() {
            text.push('\n');
            continue;
        }
        if text.ends_with('\\') {
            text.pop();
            continue;
        }
        if text.is_empty() {
            mark_of_rest = mark.or(mark_of_rest);
            continue;
        }
        let not_run = mark.or(mark_of_rest.clone());
        found.push(Command { place: place(begun), text: std::mem::take(&mut text), not_run });
    }
    assert!(text.is_empty(), "{}: the command has no end", place(begun));
    found
}

/// A line's code, and its comment, after the lines `before` of the same command.
fn split_comment<'a>(before: &str, line: &'a str) -> (&'a str, &'a str) {
    let starts = line.match_indices('#').map(|(at, _)| at).find(|at| {
        let begins_word = line[..*at].ends_with(' ') || *at == 0;
        begins_word && quote(&format!("{before}{}", &line[..*at])).is_none()
    });
    let (code, comment) = line.split_at(starts.unwrap_or(line.len()));
    (code.trim_end(), comment)
}

/// The quote that is open at the end of the text.
fn quote(text: &str) -> Option<char> {
    text.chars().fold(None, |open, c| match open {
        None if c == '\'' || c == '"' => Some(c),
        Some(quote) if quote == c => None,
        other => other,
    })
}

/// The reason in a comment's mark; empty if it has none.
fn mark(comment: &str) -> Option<String> {
    let rest = comment.split_once(MARK)?.1.split(')').next()?;
    Some(rest.strip_prefix(':').unwrap_or_default().trim().to_owned())
}

#[test]
fn commands_are_read_with_their_marks() {
    let page = "```sh\na 'b #c' \\\n  d   # e (not run: f)\n\n# g\nh '[\n  i]' # j\n# (not run: k)\nl\nm # (not run)\n```\n\
                ```console\n$ n # o\np\n```\n```text\nq\n```\n";
    let command = |line: usize, text: &str, not_run: Option<&str>| Command {
        place: format!("x.md:{line}"),
        text: text.to_owned(),
        not_run: not_run.map(str::to_owned),
    };
    let wanted = [
        command(2, "a 'b #c' d", Some("f")),
        command(6, "h '[\n  i]'", None),
        command(9, "l", Some("k")),
        command(10, "m", Some("")),
        command(13, "n # o", None),
    ];
    assert_eq!(of_page("x.md", page), wanted);
}

//! Just enough of Rust's syntax to ask what a file names: code without comments and strings, without tests, and the
//! paths in it.

/// The lines before the tests at the end of a file; nothing of a file that is all tests.
pub(super) fn production<'a>(path: &str, text: &'a str) -> &'a str {
    let name = path.rsplit('/').next().unwrap_or(path);
    if name == "tests.rs" || path.contains("/tests/") || path.starts_with("tests/") {
        return "";
    }
    let starts = text.match_indices("#[cfg(test)]\nmod ").find(|(at, start)| {
        let rest = &text[at + start.len()..];
        rest.lines().next().is_some_and(|line| line.ends_with('{'))
    });
    starts.map_or(text, |(at, _)| &text[..at])
}

/// The text with comments and the insides of strings and characters blanked out, line by line as before.
pub(super) fn code(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = comment(rest).or_else(|| literal(rest, code.chars().last()));
        match skipped {
            Some(length) => {
                code.extend(rest[..length].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
                rest = &rest[length..];
            }
            None => {
                code.push(first);
                rest = &rest[first.len_utf8()..];
            }
        }
    }
    code
}

fn comment(rest: &str) -> Option<usize> {
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    let body = rest.strip_prefix("/*")?;
    Some(body.find("*/").map_or(rest.len(), |end| end + 4))
}

fn literal(rest: &str, before: Option<char>) -> Option<usize> {
    let starts = before.is_none_or(|c| !is_word(c)) || before == Some('b');
    if let Some(raw) = rest.strip_prefix('r').filter(|_| starts) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let end = format!("\"{}", "#".repeat(hashes));
            let start = 2 + hashes;
            return Some(rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len()));
        }
    }
    let mut chars = rest.char_indices();
    match chars.next()?.1 {
        '"' => {
            let mut escaped = false;
            let end = chars.find(|(_, c)| {
                let ends = *c == '"' && !escaped;
                escaped = *c == '\\' && !escaped;
                ends
            });
            Some(end.map_or(rest.len(), |(at, _)| at + 1))
        }
        // A character, not a lifetime: `'x'` or `'\…'`.
        '\'' if rest[1..].starts_with('\\') => rest[3..].find('\'').map(|at| at + 4),
        '\'' => {
            let character = rest[1..].chars().next()?;
            let end = 1 + character.len_utf8();
            rest[end..].starts_with('\'').then_some(end + 1)
        }
        _ => None,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// A path as it is written: its first word, and the words that may follow it (several for `first::{a, b}`).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NamedPath<'a> {
    pub(super) first: &'a str,
    pub(super) next: Vec<&'a str>,
    /// Counted from 1.
    pub(super) line: usize,
}

/// Every path of two or more words in `code`, and every `use word;`.
pub(super) fn paths(code: &str) -> Vec<NamedPath<'_>> {
    let mut paths = Vec::new();
    let mut line = 1;
    let mut at = 0;
    while let Some(c) = code[at..].chars().next() {
        if !is_word(c) {
            line += usize::from(c == '\n');
            at += c.len_utf8();
            continue;
        }
        let first = word(&code[at..]);
        let after = at + first.len();
        let starts = !code[..at].ends_with("::");
        let single = code[..at].ends_with("use ") && code[after..].starts_with([';', ' ']);
        match code[after..].strip_prefix("::") {
            Some(rest) if starts => paths.push(NamedPath { first, next: heads(rest), line }),
            None if single => paths.push(NamedPath { first, next: Vec::new(), line }),
            _ => {}
        }
        at = after;
    }
    paths
}

fn word(text: &str) -> &str {
    &text[..text.find(|c| !is_word(c)).unwrap_or(text.len())]
}

/// The first words of what follows `::`: one, or those of the outermost entries of a group.
fn heads(rest: &str) -> Vec<&str> {
    let Some(group) = rest.strip_prefix('{') else {
        return vec![word(rest)];
    };
    let mut heads = Vec::new();
    let mut depth = 0;
    let mut entry = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' | ',' if depth == 0 => {
                heads.push(word(group[entry..at].trim_start()));
                entry = at + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(code: &str) -> Vec<(&str, Vec<&str>)> {
        paths(code).into_iter().map(|path| (path.first, path.next)).collect()
    }

    #[test]
    fn paths_are_found_in_uses_and_in_expressions() {
        let text = "use crate::{clock::Clock, pods::{self, Pod}};\nuse aya;\nlet x = crate::role::Role::of(std::mem::take(y));";
        assert_eq!(
            named(text),
            [
                ("crate", vec!["clock", "pods"]),
                ("clock", vec!["Clock"]),
                ("pods", vec!["self", "Pod"]),
                ("aya", vec![]),
                ("crate", vec!["role"]),
                ("std", vec!["mem"]),
            ]
        );
        assert_eq!(paths(text)[3].line, 2);
    }

    #[test]
    fn comments_and_strings_are_not_code() {
        let text =
            "a::b; // c::d\n/* e::f */ \"g::h\\\"i::j\" r#\"k::\"l\"# 'x' '\\'' &'a m::n b\"o::p\"";
        assert_eq!(named(&code(text)), [("a", vec!["b"]), ("m", vec!["n"])]);
    }

    #[test]
    fn tests_are_not_production() {
        let text = "fn a() {}\n\n#[cfg(test)]\nmod fixtures;\n\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(production("src/a.rs", text), "fn a() {}\n\n#[cfg(test)]\nmod fixtures;\n\n");
        assert_eq!(production("src/a/tests.rs", text), "");
        assert_eq!(production("kiam-agent/tests/node.rs", text), "");
    }
}

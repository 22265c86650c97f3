//! Just enough of Rust's syntax to ask what a file names: code without comments and strings, and without tests.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_not_code() {
        let text =
            "a::b; // c::d\n/* e::f */ \"g::h\\\"i::j\" r#\"k::\"l\"# 'x' '\\'' &'a m::n b\"o::p\"";
        let words: Vec<_> = code(text).split_whitespace().map(str::to_owned).collect();
        assert_eq!(words, ["a::b;", "&'a", "m::n", "b"]);
    }

    #[test]
    fn tests_are_not_production() {
        let text = "fn a() {}\n\n#[cfg(test)]\nmod fixtures;\n\n#[cfg(test)]\nmod tests {\n}\n";
        assert_eq!(production("src/a.rs", text), "fn a() {}\n\n#[cfg(test)]\nmod fixtures;\n\n");
        assert_eq!(production("src/a/tests.rs", text), "");
        assert_eq!(production("kiam-agent/tests/node.rs", text), "");
    }
}

//! Text of others, before it is printed. Annotations, names and arguments may be anybody's, and hold any character.

/// What stands for a character that is not printed.
const REPLACEMENT: char = '\u{fffd}';

/// `text` without characters that end a line, end a YAML comment, or move or turn what a terminal shows.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if is_printable(c) { c } else { REPLACEMENT }).collect()
}

/// Whether all of `text` is printed as it is.
pub(crate) fn is_all_printable(text: &str) -> bool {
    text.chars().all(is_printable)
}

/// Whether `c` is none of Unicode's Cc, Cf, Cs, Co, Cn, Zl and Zp, no space but the usual one, and no mark that changes
/// the character before it. The standard library escapes just these as `\u{…}`, and a few as `\n`.
fn is_printable(c: char) -> bool {
    !c.is_control() && c.escape_debug().len() <= 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_on_its_line_is_printed() {
        for c in [
            '\n',
            '\r',
            '\t',
            '\0',
            '\u{b}',
            '\u{c}',
            '\u{1b}',
            '\u{7f}',
            '\u{85}',
            '\u{9b}',
            '\u{ad}',
            '\u{61c}',
            '\u{200b}',
            '\u{200e}',
            '\u{200f}',
            '\u{2028}',
            '\u{2029}',
            '\u{202a}',
            '\u{202e}',
            '\u{2066}',
            '\u{2069}',
            '\u{e000}',
            '\u{feff}',
            '\u{e0001}',
            '\u{10ffff}',
        ] {
            assert_eq!(printable(&format!("a{c}b")), "a\u{fffd}b", "{c:?}");
            assert!(!is_all_printable(&c.to_string()), "{c:?}");
        }
        let text = r#"arn:aws:iam::1:role/a "b" 'c' \d é 日本 😀"#;
        assert_eq!(printable(text), text);
        assert!(is_all_printable(text));
    }
}

//! `iam.amazonaws.com/permitted`: a regular expression that a role's whole ARN must match.

use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};

use super::kept::Kept;
use crate::role::{Quoted, RoleArn};

/// A longer expression is refused.
const MAX_LENGTH: usize = 16 * 1024;

/// A larger compiled expression is refused: whoever annotates namespaces must not fill the agent's memory.
const MAX_COMPILED_BYTES: usize = 256 * 1024;

static COMPILED: LazyLock<Kept<Result<Regex, InvalidExpression>>> = LazyLock::new(Kept::default);

/// The roles that a namespace's pods may have.
#[derive(Clone, Debug)]
pub struct Permitted(Regex);

/// An expression that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no regular expression that can be used: {1}")]
pub struct InvalidExpression(Quoted, Quoted);

// === impl Permitted ===

impl Permitted {
    /// Compiles `text`, anchored as a whole: kiam's `^` and `$` around `a|b` also permitted `a-admin`. It
    /// must be an expression by itself, else `a)|(?:.*` would close the group and permit everything.
    ///
    /// # Errors
    ///
    /// [`InvalidExpression`] when it has a mistake, is too long or grows too large.
    pub fn parse(text: &str) -> Result<Self, InvalidExpression> {
        if text.len() > MAX_LENGTH {
            let problem = Quoted::new(&format!("it is longer than {MAX_LENGTH} bytes"));
            return Err(InvalidExpression(Quoted::new(text), problem));
        }
        let make = || {
            compile(text).and_then(|_| compile(&format!("^(?:{text})$"))).map_err(|error| {
                InvalidExpression(Quoted::new(text), Quoted::new(last_line(&error)))
            })
        };
        COMPILED.get(text, make).map(Self)
    }

    /// Whether it matches the whole ARN.
    #[must_use]
    pub fn matches(&self, role: &RoleArn) -> bool {
        self.0.is_match(role.as_ref())
    }
}

fn compile(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text)
        .size_limit(MAX_COMPILED_BYTES)
        .dfa_size_limit(MAX_COMPILED_BYTES)
        .build()
        .map_err(|error| error.to_string())
}

/// The error's last line says what is wrong; those before it draw where.
fn last_line(error: &str) -> &str {
    let last = error.lines().last().unwrap_or_default();
    last.strip_prefix("error: ").unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: &str = "arn:aws:iam::123456789012:role/team/reader";

    fn permits(text: &str) -> Result<bool, InvalidExpression> {
        Permitted::parse(text).map(|permitted| permitted.matches(&READER.parse().unwrap()))
    }

    #[test]
    fn expressions_match_the_whole_arn_only() {
        let cases = [
            (".*", true),
            ("", false),
            (READER, true),
            ("reader", false),
            (".*reader", true),
            ("arn:aws:iam::123456789012:role/team/.*", true),
            ("arn:aws:iam::123456789012:role/team/read", false),
            ("arn:aws:iam::123456789012:role/te|.*/admin", false),
            ("x|arn:aws:iam::.*", true),
            ("^arn:.*reader$", true),
            (".*READER", false),
            ("(?i).*READER", true),
            ("(?m)^reader$", false),
        ];
        for (text, matches) in cases {
            assert_eq!(permits(text), Ok(matches), "{text:?}");
            assert_eq!(permits(text), Ok(matches), "{text:?} when it is kept");
        }
    }

    #[test]
    fn what_is_no_expression_by_itself_permits_nothing() {
        let nested = "(".repeat(5_000) + &")".repeat(5_000);
        let huge = "(a{1000}){1000}";
        for text in ["(", "[", "*", "a)|(?:.*", ")|(", "(?<!a)b", "\\1", huge, &nested] {
            let error = permits(text).unwrap_err().to_string();
            assert!(error.len() < 500 && !error.contains('\n'), "{error}");
        }
        let long = "|".repeat(MAX_LENGTH + 1);
        assert!(permits(&long).unwrap_err().to_string().contains("longer than 16384 bytes"));
        let error = permits("a(").unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"a(\" is no regular expression that can be used: \"unclosed group\""
        );
    }
}

//! `iam.amazonaws.com/allowed-roles`: a list of globs, one of which a role's whole ARN must match.

use std::sync::Arc;

use super::memo::{Memo, Weigh};
use crate::{
    pods::TooLong,
    role::{BaseArn, QuotedText, RoleArn, RoleProblem, RoleResolver},
};

/// The longest annotation. Matching takes time in proportion, and an annotation must not keep the agent busy. A thousand
/// globs fit.
const MAX_LENGTH: usize = 64 * 1024;

/// The most globs of a list: each takes more memory than its text.
const MAX_GLOBS: usize = 1_000;

/// Bytes that a list takes to remember which of its globs matches which role.
const ROOM_FOR_ROLES: usize = 16 * 1024;

/// The roles that a namespace's pods may have, as globs.
///
/// The globs are kube2iam's, but a `*` (any characters) or a `?` (one) stays within a segment of the ARN: neither
/// stands for `/` or `:`. So `team/*` allows no role of `team/admins/`, and no account is matched by accident.
#[derive(Clone, Debug)]
pub struct AllowedRoles(Arc<List>);

/// A list that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAllowedRoles {
    /// Not JSON, or other JSON.
    #[error("{0} is no JSON list of roles, such as [\"reader\", \"team/*\"]")]
    NotAList(QuotedText),
    /// The list is empty, which is rarely meant.
    #[error("the list is empty, so that no role is allowed")]
    Empty,
    /// A glob that can match no role.
    #[error("{text} is no glob of a role: {problem}")]
    Glob {
        /// The glob.
        text: QuotedText,
        /// What is wrong with it.
        problem: RoleProblem,
    },
    /// Too many globs.
    #[error("{0} globs are too many: a list takes at most {MAX_GLOBS}")]
    Count(usize),
    /// Too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

#[derive(Debug)]
struct List {
    globs: Box<[Glob]>,
    /// The index of the first glob that matches, by role. Pods request the same roles at every decision, and a list can be
    /// written so that matching takes milliseconds.
    matched: Memo<Option<usize>>,
}

#[derive(Debug)]
struct Glob {
    /// As written.
    text: Box<str>,
    /// The base that completes the glob, which is matched literally.
    base: Option<BaseArn>,
    /// The offset in the text of the part that is completed, where `*` and `?` are wildcards.
    rest: usize,
}

// === impl AllowedRoles ===

impl AllowedRoles {
    /// Parses `text`. Globs are completed as the roles of pods are.
    ///
    /// # Errors
    ///
    /// [`InvalidAllowedRoles`].
    pub fn parse(text: &str, resolver: &RoleResolver) -> Result<Self, InvalidAllowedRoles> {
        if text.len() > MAX_LENGTH {
            return Err(TooLong { length: text.len(), most: MAX_LENGTH }.into());
        }
        let globs: Vec<String> = serde_json::from_str(text)
            .map_err(|_| InvalidAllowedRoles::NotAList(QuotedText::new(text)))?;
        if globs.is_empty() {
            return Err(InvalidAllowedRoles::Empty);
        }
        if globs.len() > MAX_GLOBS {
            return Err(InvalidAllowedRoles::Count(globs.len()));
        }
        let globs: Result<Box<[Glob]>, _> =
            globs.into_iter().map(|text| Glob::new(text, resolver)).collect();
        Ok(Self(Arc::new(List { globs: globs?, matched: Memo::new(ROOM_FOR_ROLES) })))
    }

    /// The first glob, as written, that matches the whole ARN.
    #[must_use]
    pub fn matched(&self, role: &RoleArn) -> Option<&str> {
        let List { globs, matched } = &*self.0;
        let role = role.as_ref();
        let first = matched.get(role, || globs.iter().position(|glob| glob.matches(role)));
        first.map(|index| &*globs[index].text)
    }
}

impl Weigh for AllowedRoles {
    fn weight(&self) -> usize {
        let globs = &self.0.globs;
        let texts: usize = globs.iter().map(|glob| glob.text.len()).sum();
        size_of::<List>() + size_of_val(&**globs) + texts + ROOM_FOR_ROLES
    }
}

// === impl Glob ===

impl Glob {
    fn new(text: String, resolver: &RoleResolver) -> Result<Self, InvalidAllowedRoles> {
        match resolver.complete(&text) {
            Ok((base, rest)) => {
                let (base, rest) = (base.cloned(), text.len() - rest.len());
                Ok(Self { text: text.into(), base, rest })
            }
            Err(problem) => {
                Err(InvalidAllowedRoles::Glob { text: QuotedText::new(&text), problem })
            }
        }
    }

    fn matches(&self, role: &str) -> bool {
        let base = self.base.as_ref().map_or("", AsRef::as_ref);
        let glob = &self.text.as_bytes()[self.rest..];
        role.strip_prefix(base).is_some_and(|rest| matches(glob, rest.as_bytes()))
    }
}

/// Whether `glob` matches all of `text`, without recursion: at a mismatch the last `*` takes one more character.
///
/// No earlier `*` need be tried again. One of the same segment could take nothing that the last can't, and the segments
/// of `glob` and `text` correspond one to one.
fn matches(glob: &[u8], text: &[u8]) -> bool {
    let within_segment = |byte: u8| byte != b'/' && byte != b':';
    let (mut at, mut seen) = (0, 0);
    let mut last: Option<(usize, usize)> = None;
    while at < glob.len() || seen < text.len() {
        match (glob.get(at), text.get(seen)) {
            (Some(b'*'), _) => {
                last = Some((at, seen));
                at += 1;
            }
            (Some(b'?'), Some(&byte)) if within_segment(byte) => (at, seen) = (at + 1, seen + 1),
            (Some(&wanted), Some(&byte)) if wanted == byte && wanted != b'?' => {
                (at, seen) = (at + 1, seen + 1);
            }
            _ => match last {
                Some((star, taken))
                    if text.get(taken).is_some_and(|&byte| within_segment(byte)) =>
                {
                    last = Some((star, taken + 1));
                    (at, seen) = (star + 1, taken + 1);
                }
                _ => return false,
            },
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: &str = "arn:aws:iam::123456789012:role/team/reader";

    fn matched(base: &str, list: &str, role: &str) -> Result<Option<String>, String> {
        let resolver = RoleResolver::new(Some(base.parse().unwrap()));
        let allowed = AllowedRoles::parse(list, &resolver).map_err(|error| error.to_string())?;
        Ok(allowed.matched(&role.parse().unwrap()).map(str::to_owned))
    }

    fn allows(list: &str, role: &str) -> bool {
        matched("arn:aws:iam::123456789012:role/", list, role).unwrap().is_some()
    }

    #[test]
    fn globs_match_the_whole_arn_and_stay_within_its_segments() {
        let cases = [
            (READER, true),
            ("team/reader", true),
            ("/team/reader", true),
            ("team/*", true),
            ("*/reader", true),
            ("*/*", true),
            ("team/read??", true),
            ("team/r*e*", true),
            ("team/**", true),
            ("team/*reader*", true),
            ("arn:aws:iam::*:role/team/reader", true),
            ("arn:aws:iam::123456789012:role/*/*", true),
            ("*", false),
            ("team*", false),
            ("team?reader", false),
            ("reader", false),
            ("team/read?", false),
            ("team/READER", false),
            ("team/reade", false),
            ("team/readers", false),
            ("arn:aws:iam::*", false),
            ("arn:*", false),
            ("arn:*:role/team/reader", false),
            ("arn:aws:iam::999999999999:role/team/*", false),
            // No expression: every other character is itself.
            ("team/.*", false),
            ("team/(reader)", false),
            ("team/[r]eader", false),
            ("x|team/reader", false),
            ("team/reader$", false),
            ("team/\u{e9}*", false),
        ];
        for (glob, allowed) in cases {
            let list = serde_json::json!([glob]).to_string();
            assert_eq!(allows(&list, READER), allowed, "{glob}");
        }
        assert!(!allows(r#"["team/*"]"#, "arn:aws:iam::123456789012:role/team/sub/reader"));
        assert!(!allows(r#"["x.y"]"#, "arn:aws:iam::123456789012:role/x-y"));
        assert!(allows(r#"["x.y"]"#, "arn:aws:iam::123456789012:role/x.y"));
    }

    #[test]
    fn the_first_glob_that_matches_is_told_as_written() {
        let found = |list| matched("arn:aws:iam::123456789012:role/team/", list, READER);
        assert_eq!(found(r#"["writer","r*","reader"]"#), Ok(Some("r*".to_owned())));
        assert_eq!(found(r#"["team/*"]"#), Ok(None), "the base has the path already");
        let starred = "arn:aws:iam::123456789012:role/*/";
        assert_eq!(matched(starred, r#"["*"]"#, READER), Ok(None), "a base is no glob");
    }

    #[test]
    fn what_is_no_list_of_globs_is_told() {
        let long = format!("[\"{}\"]", "x".repeat(MAX_LENGTH));
        let long_glob = format!("[\"{}\"]", "*a".repeat(1_025));
        let many = serde_json::json!(vec!["a"; MAX_GLOBS + 1]).to_string();
        for (list, expected) in [
            ("", "is no JSON list"),
            ("reader", "is no JSON list"),
            ("\"reader\"", "is no JSON list"),
            ("null", "is no JSON list"),
            ("{}", "is no JSON list"),
            ("[1]", "is no JSON list"),
            ("[\"a\", null]", "is no JSON list"),
            ("[\"a\",]", "is no JSON list"),
            ("[]", "empty"),
            ("[\"\"]", "\"\" is no glob of a role: it is empty"),
            (&long, "65540 bytes or more, and 65536 are read"),
            (&long_glob, "is no glob of a role: an ARN has 20 to 2048"),
            (&many, "1001 globs are too many"),
        ] {
            let error = matched("arn:aws:iam::123456789012:role/", list, READER).unwrap_err();
            assert!(error.contains(expected) && error.len() < 500, "{error}");
        }
    }

    /// The same as an expression, by the regex crate.
    fn expression(glob: &str) -> regex::Regex {
        let mut text = String::from("^");
        for c in glob.chars() {
            match c {
                '*' => text.push_str("[^/:]*"),
                '?' => text.push_str("[^/:]"),
                c => text.push_str(&regex::escape(&c.to_string())),
            }
        }
        regex::Regex::new(&(text + "$")).unwrap()
    }

    #[test]
    fn matches_what_the_same_expression_matches() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut some = |from: &[char], most| -> String {
            (0..random.usize(..most)).map(|_| from[random.usize(..from.len())]).collect()
        };
        let mut both = [0, 0];
        for _ in 0..400 {
            let glob = some(&['*', '*', '?', 'a', 'b', '/', ':'], 9);
            let expression = expression(&glob);
            for _ in 0..100 {
                let text = some(&['a', 'a', 'b', '/', ':', '?', '*'], 9);
                let expected = expression.is_match(&text);
                assert_eq!(matches(glob.as_bytes(), text.as_bytes()), expected, "{glob} {text}");
                both[usize::from(expected)] += 1;
            }
        }
        assert!(both[0] > 1_000 && both[1] > 1_000, "{both:?}");
    }

    #[test]
    fn a_thousand_globs_are_no_trouble_and_neither_is_one_that_tries_to_be() {
        let globs: Vec<String> = (0..1_000).map(|n| format!("team-{n}/{:x<40}*", "")).collect();
        let list = serde_json::to_string(&globs).unwrap();
        assert!(!allows(&list, READER));
        let last = format!("arn:aws:iam::123456789012:role/team-999/{:x<40}y", "");
        assert!(allows(&list, &last));
        let odd = serde_json::json!([format!("{}b", "*a".repeat(1_000))]).to_string();
        let role = format!("arn:aws:iam::123456789012:role/{}", "a".repeat(64));
        assert!(!allows(&odd, &role));
    }

    /// Every decision asks again. Matched each time, this list would take half an hour.
    #[test]
    fn a_role_is_matched_once() {
        let globs = vec![format!("*{}b/r", "a".repeat(250)); 250];
        let resolver = RoleResolver::new(Some("arn:aws:iam::1:role/".parse().unwrap()));
        let list = serde_json::to_string(&globs).unwrap();
        let allowed = AllowedRoles::parse(&list, &resolver).unwrap();
        let role = format!("arn:aws:iam::1:role/{}/r", "a".repeat(510)).parse().unwrap();
        for _ in 0..10_000 {
            assert_eq!(allowed.matched(&role), None);
        }
        assert_eq!(allowed.0.matched.get(role.as_ref(), || Some(0)), None, "it is remembered");
    }
}

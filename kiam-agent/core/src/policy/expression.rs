//! `iam.amazonaws.com/permitted`: a regular expression that a role's whole ARN must match.

use std::{
    convert::Infallible,
    sync::{Arc, LazyLock},
};

use regex_automata::nfa::thompson::{Compiler, Config, WhichCaptures, pikevm::PikeVM};
use regex_syntax::{
    ast::{self, Ast, parse::Parser},
    hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Look},
};

use super::memo::{Memo, Weigh};
use crate::{
    pods::TooLong,
    role::{QuotedText, RoleArn},
};

/// The longest expression, in bytes.
const MAX_LENGTH: usize = 16 * 1024;

/// The largest compiled expression: an annotation must not fill the agent's memory.
const MAX_COMPILED_BYTES: usize = 256 * 1024;

/// The most classes such as `\w` and `\pL`: each takes kilobytes while the expression is parsed.
const MAX_CLASSES: usize = 256;

/// The most sets of characters where case is ignored: adding the other case of Unicode's characters takes milliseconds
/// for each set, and an annotation must not fill the agent's time either.
const MAX_FOLDED: usize = 16;

/// Bytes that all compiled expressions take. Hundreds of usual ones fit; others are compiled again when they are needed.
const ROOM: usize = 4 * 1024 * 1024;

/// Bytes that an expression takes to remember which roles it matches.
const ROOM_FOR_ROLES: usize = 8 * 1024;

static COMPILED: LazyLock<Memo<Result<PermittedRoles, InvalidExpression>>> =
    LazyLock::new(|| Memo::new(ROOM));

/// The roles that a namespace's pods may have.
#[derive(Clone, Debug)]
pub struct PermittedRoles(Arc<Expression>);

/// An expression that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidExpression {
    /// It is malformed, or grows too large.
    #[error("{0} is no regular expression that can be used: {1}")]
    Unusable(QuotedText, QuotedText),
    /// Too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
}

#[derive(Debug)]
struct Expression {
    /// The engine that takes the least memory. The faster engines keep hundreds of kilobytes for each expression and
    /// thread, and bring nothing here: roles are short and few.
    machine: PikeVM,
    matched: Memo<bool>,
}

// === impl PermittedRoles ===

impl PermittedRoles {
    /// Compiles `text`, which must match as a whole: kiam's `^` and `$` around `a|b` also permitted `a-admin`. The text is
    /// parsed alone, since `a)|(?:.*` would otherwise close a group around it and permit everything.
    ///
    /// # Errors
    ///
    /// [`InvalidExpression`] when it is malformed, too long or grows too large.
    pub fn parse(text: &str) -> Result<Self, InvalidExpression> {
        if text.len() > MAX_LENGTH {
            return Err(TooLong { length: text.len(), most: MAX_LENGTH }.into());
        }
        COMPILED.get_slowly(text, || match compile(text) {
            Ok(machine) => {
                let matched = Memo::new(ROOM_FOR_ROLES);
                Ok(Self(Arc::new(Expression { machine, matched })))
            }
            Err(problem) => {
                Err(InvalidExpression::Unusable(QuotedText::new(text), QuotedText::new(&problem)))
            }
        })
    }

    /// Whether it matches the whole ARN.
    #[must_use]
    pub fn matches(&self, role: &RoleArn) -> bool {
        self.matches_text(role.as_ref())
    }

    /// Whether it matches the whole text. It is for comparisons with kiam v2 and v3, which matched a role as the pod named
    /// it.
    #[must_use]
    pub fn matches_text(&self, text: &str) -> bool {
        let Expression { machine, matched } = &*self.0;
        matched.get(text, || machine.is_match(&mut machine.create_cache(), text))
    }
}

impl Weigh for PermittedRoles {
    fn weight(&self) -> usize {
        size_of::<Expression>() + self.0.machine.get_nfa().memory_usage() + ROOM_FOR_ROLES
    }
}

fn compile(text: &str) -> Result<PikeVM, String> {
    let is_class = |pair: &&[u8]| pair[0] == b'\\' && b"dDpPsSwW".contains(&pair[1]);
    if text.as_bytes().windows(2).filter(is_class).count() > MAX_CLASSES {
        return Err(format!("it has more than {MAX_CLASSES} classes such as \\w"));
    }
    if ignores_case_of_more_than(MAX_FOLDED, text) {
        return Err(format!("it ignores case, and has more than {MAX_FOLDED} sets of characters"));
    }
    let tree = regex_syntax::parse(text).map_err(|error| last_line(&error.to_string()))?;
    let whole = Hir::concat(vec![Hir::look(Look::Start), ascii(tree), Hir::look(Look::End)]);
    let config =
        Config::new().nfa_size_limit(Some(MAX_COMPILED_BYTES)).which_captures(WhichCaptures::None);
    let nfa = Compiler::new().configure(config).build_from_hir(&whole);
    let nfa = nfa.map_err(|error| match error.size_limit() {
        Some(limit) => format!("compiled it takes more than {limit} bytes"),
        None => error.to_string(),
    })?;
    PikeVM::new_from_nfa(nfa).map_err(|error| error.to_string())
}

/// Whether `text` ignores case somewhere, and has more sets of characters and operations on sets than `most`. Malformed
/// text is rejected before any of that costs time.
fn ignores_case_of_more_than(most: usize, text: &str) -> bool {
    let Ok(tree) = Parser::new().parse(text) else { return false };
    let (ignores_case, sets) = ast::visit(&tree, Folding::default()).unwrap_or_default();
    ignores_case && sets > most
}

/// A visitor that finds whether case is ignored, and counts the sets.
#[derive(Debug, Default)]
struct Folding {
    ignores_case: bool,
    sets: usize,
}

impl Folding {
    fn flags(&mut self, flags: &ast::Flags) {
        self.ignores_case |= flags.flag_state(ast::Flag::CaseInsensitive) == Some(true);
    }
}

impl ast::Visitor for Folding {
    type Output = (bool, usize);
    type Err = Infallible;

    fn finish(self) -> Result<Self::Output, Infallible> {
        Ok((self.ignores_case, self.sets))
    }

    fn visit_pre(&mut self, tree: &Ast) -> Result<(), Infallible> {
        match tree {
            Ast::Flags(set) => self.flags(&set.flags),
            Ast::Group(group) => {
                if let Some(flags) = group.flags() {
                    self.flags(flags);
                }
            }
            Ast::ClassUnicode(_) | Ast::ClassBracketed(_) => self.sets += 1,
            _ => {}
        }
        Ok(())
    }

    fn visit_class_set_item_pre(&mut self, item: &ast::ClassSetItem) -> Result<(), Infallible> {
        use ast::ClassSetItem::{Bracketed, Unicode};
        self.sets += usize::from(matches!(item, Unicode(_) | Bracketed(_)));
        Ok(())
    }

    fn visit_class_set_binary_op_pre(
        &mut self,
        _: &ast::ClassSetBinaryOp,
    ) -> Result<(), Infallible> {
        self.sets += 1;
        Ok(())
    }
}

/// The same expression for ASCII alone, which ARNs are: `\w` and `.` take tens of kilobytes with all of Unicode.
///
/// It recurses as deep as the parser lets groups be nested.
fn ascii(tree: Hir) -> Hir {
    let all = |trees: Vec<Hir>| trees.into_iter().map(ascii).collect();
    match tree.into_kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Literal(literal) => Hir::literal(literal.0),
        HirKind::Look(look) => Hir::look(look),
        HirKind::Class(Class::Unicode(mut class)) => {
            class.intersect(&ClassUnicode::new([ClassUnicodeRange::new('\0', '\x7f')]));
            Hir::class(Class::Unicode(class))
        }
        HirKind::Class(class) => Hir::class(class),
        HirKind::Repetition(mut repetition) => {
            repetition.sub = Box::new(ascii(*repetition.sub));
            Hir::repetition(repetition)
        }
        // The captures of a group are not needed.
        HirKind::Capture(group) => ascii(*group.sub),
        HirKind::Concat(trees) => Hir::concat(all(trees)),
        HirKind::Alternation(trees) => Hir::alternation(all(trees)),
    }
}

/// The error's last line, which says what is wrong. The lines before it show where.
fn last_line(error: &str) -> String {
    let last = error.lines().last().unwrap_or_default();
    last.strip_prefix("error: ").unwrap_or(last).to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;

    const READER: &str = "arn:aws:iam::123456789012:role/team/reader";

    const PIECES: [&str; 38] = [
        "arn:aws:iam::",
        "\\d+",
        "\\w",
        "\\W",
        "\\s*",
        "\\S+",
        ".",
        ".*",
        "[^/]*",
        "[a-z]+",
        "\\pL",
        "\\PL",
        "\\p{Greek}?",
        ":role/",
        "role",
        "r",
        "reader",
        "(?i)",
        "(?i:READER)",
        "|",
        "(a|b)",
        "\\b",
        "\\B",
        "^",
        "$",
        "(?m)",
        "\\z",
        "{2}",
        "\\x{212a}",
        "k",
        "\u{e9}?",
        "[\u{e9}k]",
        "[[:alpha:]]+",
        "(?s:.)",
        "(?U).+",
        "(?-u:\\w+)",
        "&",
        "\n?",
    ];

    fn permits(text: &str) -> Result<bool, InvalidExpression> {
        PermittedRoles::parse(text).map(|permitted| permitted.matches(&READER.parse().unwrap()))
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
        let error = permits(&long).unwrap_err().to_string();
        assert!(error.contains("16385 bytes") && error.contains("16384 are read"), "{error}");
        let error = permits("a(").unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"a(\" is no regular expression that can be used: \"unclosed group\""
        );
    }

    /// Both machines must say the same; the usual one is the regex crate's.
    #[test]
    fn permits_what_the_usual_machine_permits() {
        let roles = [
            READER,
            "arn:aws:iam::1:role/r",
            "arn:aws-cn:iam::123456789012:role/a/b/c.d@e",
            "arn:aws:iam::123456789012:role/K_k-s",
        ];
        let (mut rng, mut both, mut unusable) = (fastrand::Rng::with_seed(3), [0, 0], 0);
        for _ in 0..1_500 {
            let text: String =
                (0..rng.usize(1..7)).map(|_| PIECES[rng.usize(..PIECES.len())]).collect();
            let text = if rng.bool() { format!(".*{text}.*") } else { text };
            let usual =
                regex::Regex::new(&text).and_then(|_| regex::Regex::new(&format!("^(?:{text})$")));
            let (Ok(permitted), Ok(usual)) = (PermittedRoles::parse(&text), &usual) else {
                assert_eq!(
                    PermittedRoles::parse(&text).is_ok(),
                    usual.is_ok(),
                    "{text:?}: {usual:?}"
                );
                unusable += 1;
                continue;
            };
            for role in roles {
                let expected = usual.is_match(role);
                assert_eq!(permitted.matches(&role.parse().unwrap()), expected, "{text:?} {role}");
                both[usize::from(expected)] += 1;
            }
        }
        assert!(both.iter().all(|&it| it > 200) && unusable > 20, "{both:?} {unusable}");
    }

    #[test]
    fn an_expression_takes_kilobytes_and_what_takes_more_than_the_bound_is_named() {
        let weight = |text: &str| PermittedRoles::parse(text).unwrap().weight() - ROOM_FOR_ROLES;
        for text in [".*", "arn:aws:iam::\\d+:role/team/[\\w+=,.@-]+", "(?i)\\w+|\\W+|\\pL*"] {
            assert!(weight(text) < 8 * 1024, "{text}: {}", weight(text));
        }
        let roles: Vec<_> = (0..100).map(|n| format!("{READER}-{n}")).collect();
        let list = roles.join("|");
        assert!(weight(&list) < MAX_COMPILED_BYTES, "{}", weight(&list));
        for (text, bound) in [
            ("a".repeat(MAX_LENGTH), "more than 262144 bytes"),
            ("(a{1000}){1000}".to_owned(), "more than 262144 bytes"),
            ("\\w".repeat(MAX_LENGTH / 2), "more than 256 classes"),
        ] {
            let error = permits(&text).unwrap_err().to_string();
            let start: String = text.escape_default().take(5).collect();
            assert!(error.contains(bound) && error.contains(&start), "{error}");
        }
    }

    /// Without the bound the first of these takes a minute and more of a runtime's thread.
    #[test]
    fn no_expression_takes_seconds_to_be_read() {
        let fill = |piece: &str| format!("(?i){}b", piece.repeat((MAX_LENGTH - 5) / piece.len()));
        for text in [
            fill("[!-\u{10ffff}]|"),
            fill("[b[^a]]|"),
            fill("[a&&[^b]]|"),
            format!("(?i:{}b)", "\\p{any}|".repeat(255)),
            format!("b{}", "(?s-u:b)[b[^a]](?i)".repeat(100)),
            format!("(?i){}\\p{{any}}{}", "[b".repeat(100), "]".repeat(100)),
        ] {
            let begun = Instant::now();
            let error = permits(&text).unwrap_err().to_string();
            assert!(error.contains("more than 16 sets of characters"), "{error}");
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        }
        assert_eq!(permits(&format!("(?i).*READER{}", "[a-z]?".repeat(16))), Ok(true));
        assert_eq!(permits(&format!(".*reader{}", "[a-z]?".repeat(100))), Ok(true));
    }

    /// As many as an adversary likes, each of them asked for again and again.
    #[test]
    fn however_many_expressions_there_are_memory_is_bounded() {
        let kept = Memo::new(ROOM);
        let weight = |permitted: &Result<PermittedRoles, InvalidExpression>| permitted.weight();
        let mut most = 0;
        for n in 0..600 {
            let text = format!("arn:aws:iam::\\d+:role/{n}/({})", "[a-z]x|".repeat(n));
            let made = kept.get(&text, || PermittedRoles::parse(&text));
            assert!(
                made.unwrap().matches(&format!("arn:aws:iam::1:role/{n}/bx").parse().unwrap())
                    == (n > 0)
            );
            most = most.max(kept.total(weight));
        }
        assert!(most > ROOM / 3 && most <= ROOM, "{most}");
    }
}

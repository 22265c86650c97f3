//! From the regular expression of kiam's `--whitelist-route-regexp` to the paths of `--allow-path`.

use regex_syntax::hir::{Dot, Hir, HirKind, Look, Repetition};

/// The most paths that an expression may stand for.
const MOST: usize = 100;
/// A path's end that stands for everything below.
const BELOW: &str = "/*";

/// The paths that an expression stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Routes {
    /// None.
    Nothing,
    /// These, as `--allow-path` takes them.
    Paths(Vec<String>),
    /// These, and others that a path of `--allow-path` can only stand for together with more than they are.
    Wider {
        /// What is exact.
        paths: Vec<String>,
        /// What would open more.
        wider: Vec<String>,
    },
    /// Most paths, or an expression that stands for too many.
    Broad,
}

/// A beginning of paths, and what may follow.
#[derive(Clone)]
struct Beginning {
    text: String,
    rest: Rest,
    /// Whether the text's end is here: the expression says so.
    is_end: bool,
}

/// What follows a beginning.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rest {
    Nothing,
    /// `.*` or `.+`, up to the end.
    Anything,
    /// Slashes, as in `/*`, which is meant as a glob, and matches anything where no end is bound.
    Slashes,
    /// Something else, such as `.*/vpc-id`.
    Some,
}

/// The paths that `expression` stands for.
pub(super) fn routes(expression: &str) -> Routes {
    let Ok(tree) = regex_syntax::parse(expression) else { return Routes::Broad };
    let Some(beginnings) = beginnings(&tree) else { return Routes::Broad };
    // `^$`, kiam's own value, which no path matches.
    let some = beginnings.into_iter().filter(|it| it.rest != Rest::Nothing || !it.text.is_empty());
    let paths: Option<Vec<(String, bool)>> = some.map(|beginning| path(&beginning)).collect();
    match paths {
        None => Routes::Broad,
        Some(paths) if paths.is_empty() => Routes::Nothing,
        Some(mut paths) => {
            paths.sort();
            paths.dedup();
            let (wider, paths): (Vec<_>, Vec<_>) = paths.into_iter().partition(|(_, wider)| *wider);
            let names =
                |paths: Vec<(String, bool)>| paths.into_iter().map(|(path, _)| path).collect();
            match wider.is_empty() {
                true => Routes::Paths(names(paths)),
                false => Routes::Wider { paths: names(paths), wider: names(wider) },
            }
        }
    }
}

/// The path of `--allow-path`, and whether it is wider than the expression; `None` of a beginning that leaves most paths open. kiam matches an expression anywhere in a
/// path, but whoever writes a whole path means that path.
fn path(beginning: &Beginning) -> Option<(String, bool)> {
    let text = beginning.text.trim_end_matches('/');
    let rest = text.strip_prefix("/latest/")?;
    let depth = rest.split('/').filter(|segment| !segment.is_empty()).count();
    match beginning.rest {
        // `/latest/meta-data/.*`
        _ if depth < 2 => None,
        Rest::Nothing => Some((text.to_owned(), false)),
        rest if beginning.text.ends_with('/') => {
            Some((format!("{text}{BELOW}"), rest == Rest::Some))
        }
        // `/latest/meta-data/instance-.*` begins names, which no path of the flag does.
        _ => None,
    }
}

/// The beginnings of all texts that `tree` matches, if they are few.
fn beginnings(tree: &Hir) -> Option<Vec<Beginning>> {
    let found = match tree.kind() {
        HirKind::Look(Look::End | Look::EndLF | Look::EndCRLF) => {
            vec![Beginning { is_end: true, ..Beginning::of("") }]
        }
        HirKind::Empty | HirKind::Look(_) => vec![Beginning::of("")],
        HirKind::Literal(literal) => vec![Beginning::of(std::str::from_utf8(&literal.0).ok()?)],
        HirKind::Capture(group) => beginnings(&group.sub)?,
        HirKind::Alternation(parts) => {
            let mut all = Vec::new();
            for part in parts {
                all.extend(beginnings(part)?);
            }
            all
        }
        HirKind::Concat(parts) => {
            let mut all = vec![Beginning::of("")];
            for part in parts {
                let next = beginnings(part)?;
                all = all.iter().flat_map(|first| next.iter().map(|it| first.then(it))).collect();
                if all.len() > MOST {
                    return None;
                }
            }
            all
        }
        HirKind::Repetition(repetition) if (repetition.min, repetition.max) == (0, Some(1)) => {
            let mut all = beginnings(&repetition.sub)?;
            all.push(Beginning::of(""));
            all
        }
        HirKind::Repetition(repetition) => vec![repeated(repetition)],
        HirKind::Class(_) => vec![Beginning { rest: Rest::Some, ..Beginning::of("") }],
    };
    (found.len() <= MOST).then_some(found)
}

/// The beginning that a repetition is.
fn repeated(repetition: &Repetition) -> Beginning {
    let is_open = repetition.max.is_none();
    match repetition.sub.kind() {
        HirKind::Literal(literal) if *literal.0 == *b"/" && is_open => {
            Beginning { rest: Rest::Slashes, ..Beginning::of("/") }
        }
        _ if is_open && repetition.min <= 1 && is_any(&repetition.sub) => {
            Beginning { rest: Rest::Anything, ..Beginning::of("") }
        }
        _ => Beginning { rest: Rest::Some, ..Beginning::of("") },
    }
}

/// Whether `tree` is `.`, or a group of it.
fn is_any(tree: &Hir) -> bool {
    match tree.kind() {
        HirKind::Capture(group) => is_any(&group.sub),
        _ => *tree == Hir::dot(Dot::AnyCharExceptLF) || *tree == Hir::dot(Dot::AnyChar),
    }
}

// === impl Beginning ===

impl Beginning {
    fn of(text: &str) -> Self {
        Self { text: text.to_owned(), rest: Rest::Nothing, is_end: false }
    }

    /// What begins with this, and goes on with `next`.
    fn then(&self, next: &Self) -> Self {
        let is_empty = next.text.is_empty() && next.rest == Rest::Nothing;
        let rest = match self.rest {
            Rest::Nothing => {
                let text = format!("{}{}", self.text, next.text);
                return Self { text, rest: next.rest, is_end: self.is_end || next.is_end };
            }
            Rest::Anything if is_empty => Rest::Anything,
            Rest::Slashes if is_empty && !next.is_end => Rest::Slashes,
            // `/*.*`
            Rest::Slashes if next.text.is_empty() && next.rest == Rest::Anything => Rest::Anything,
            _ => Rest::Some,
        };
        Self { text: self.text.clone(), rest, is_end: self.is_end || next.is_end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(texts: &[&str]) -> Routes {
        let mut paths: Vec<String> = texts.iter().map(|text| format!("/latest/{text}")).collect();
        paths.sort();
        Routes::Paths(paths)
    }

    #[test]
    fn expressions_that_name_paths_become_these_paths() {
        assert_eq!(routes("^$"), Routes::Nothing);
        assert_eq!(routes(""), Routes::Nothing);
        assert_eq!(
            routes(
                "(/latest/meta-data/placement/availability-zone|/latest/dynamic/instance-identity/document)"
            ),
            paths(&["meta-data/placement/availability-zone", "dynamic/instance-identity/document"])
        );
        // Of AWS Node Termination Handler's documents.
        let handler = r"^\/latest\/meta-data\/(spot\/instance-action|instance-(id|type)|placement\/availability-zone)|\/latest\/dynamic\/instance-identity\/document$";
        assert_eq!(
            routes(handler),
            paths(&[
                "meta-data/spot/instance-action",
                "meta-data/instance-id",
                "meta-data/instance-type",
                "meta-data/placement/availability-zone",
                "dynamic/instance-identity/document",
            ])
        );
        assert_eq!(routes("/latest/meta-data/tags/.*"), paths(&["meta-data/tags/*"]));
        assert_eq!(routes("^/latest/meta-data/network/*"), paths(&["meta-data/network/*"]));
        assert_eq!(routes("/latest/meta-data/instance-id/?"), paths(&["meta-data/instance-id"]));
    }

    #[test]
    fn a_path_that_is_wider_than_the_expression_is_told_apart() {
        let wider = |expression: &str| match routes(expression) {
            Routes::Wider { paths, wider } => (paths, wider),
            other => panic!("{expression}: {other:?}"),
        };
        let macs = "/latest/meta-data/network/interfaces/macs/*".to_owned();
        for rest in
            [".*/vpc-id$", ".*/vpc-id", "[0-9a-f:]+/vpc-id", "[^/]+", ".{3}", ".", "(.*/)?x", "/*$"]
        {
            let expression = format!("^/latest/meta-data/network/interfaces/macs/{rest}");
            assert!(wider(&expression).1.contains(&macs), "{expression}");
        }
        for rest in [".*", ".+", ".*$", "(.*)$", ".+$", "*"] {
            let expression = format!("^/latest/meta-data/network/interfaces/macs/{rest}");
            assert_eq!(routes(&expression), Routes::Paths(vec![macs.clone()]), "{expression}");
        }
        let (paths, both) = wider("/latest/meta-data/instance-id|/latest/meta-data/tags/.+/x");
        assert_eq!(paths, ["/latest/meta-data/instance-id"]);
        assert_eq!(both, ["/latest/meta-data/tags/*"]);
    }

    #[test]
    fn expressions_that_open_most_paths_are_broad() {
        for expression in [
            ".*",
            "/latest",
            "/latest/*",
            "/latest/.*",
            "meta-data",
            "^/latest/meta-data/.*",
            "/latest/meta-data/instance-.*",
            "/latest/meta-data/[a-z]+",
            "(",
        ] {
            assert_eq!(routes(expression), Routes::Broad, "{expression}");
        }
    }
}

//! From the regular expression of kiam's `--whitelist-route-regexp` to the paths of `--allow-path`.

use regex_syntax::hir::{Hir, HirKind};

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
    /// Most paths, or an expression that stands for too many.
    Broad,
}

/// A beginning of paths, and whether anything may follow.
#[derive(Clone)]
struct Beginning {
    text: String,
    goes_on: bool,
}

/// The paths that `expression` stands for.
pub(super) fn routes(expression: &str) -> Routes {
    let Ok(tree) = regex_syntax::parse(expression) else { return Routes::Broad };
    let Some(beginnings) = beginnings(&tree) else { return Routes::Broad };
    // `^$`, kiam's own value, which no path matches.
    let some = beginnings.into_iter().filter(|it| it.goes_on || !it.text.is_empty());
    let paths: Option<Vec<String>> = some.map(|beginning| path(&beginning)).collect();
    match paths {
        None => Routes::Broad,
        Some(paths) if paths.is_empty() => Routes::Nothing,
        Some(mut paths) => {
            paths.sort();
            paths.dedup();
            Routes::Paths(paths)
        }
    }
}

/// The path of `--allow-path`; `None` of a beginning that leaves most paths open. kiam matches an expression anywhere in a
/// path, but whoever writes a whole path means that path.
fn path(beginning: &Beginning) -> Option<String> {
    let text = beginning.text.trim_end_matches('/');
    let rest = text.strip_prefix("/latest/")?;
    let depth = rest.split('/').filter(|segment| !segment.is_empty()).count();
    match beginning.goes_on {
        // `/latest/meta-data/.*`
        true if depth < 2 => None,
        true if beginning.text.ends_with('/') => Some(format!("{text}{BELOW}")),
        // `/latest/meta-data/instance-.*` begins names, which no path of the flag does.
        true => None,
        false if depth < 2 => None,
        false => Some(text.to_owned()),
    }
}

/// The beginnings of all texts that `tree` matches, if they are few.
fn beginnings(tree: &Hir) -> Option<Vec<Beginning>> {
    let found = match tree.kind() {
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
        // `.*`, and `/*`, which is meant as a glob.
        HirKind::Repetition(repetition) => match repetition.sub.kind() {
            HirKind::Literal(literal) if *literal.0 == *b"/" => {
                vec![Beginning { text: "/".to_owned(), goes_on: true }]
            }
            _ => vec![Beginning { text: String::new(), goes_on: true }],
        },
        HirKind::Class(_) => vec![Beginning { text: String::new(), goes_on: true }],
    };
    (found.len() <= MOST).then_some(found)
}

// === impl Beginning ===

impl Beginning {
    fn of(text: &str) -> Self {
        Self { text: text.to_owned(), goes_on: false }
    }

    /// What begins with this, and goes on with `next`.
    fn then(&self, next: &Self) -> Self {
        if self.goes_on {
            return self.clone();
        }
        Self { text: format!("{}{}", self.text, next.text), goes_on: next.goes_on }
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

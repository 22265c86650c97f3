//! How annotations of namespaces are read otherwise than before, by their text alone.

use regex_syntax::ast::{Ast, parse::Parser};

use super::old::{Kube2iam, OldRules};
use kiam_core::{policy::PermittedRoles, role::BaseArn};

/// How an annotation is read otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// Whether somebody must look, whatever the pods of the input ask for.
    pub(super) decides: bool,
    pub(super) text: String,
    /// What to write instead, if that is certain.
    pub(super) instead: Option<String>,
}

/// The difference for `iam.amazonaws.com/permitted`.
pub(super) fn permitted(text: &str, rules: &OldRules, base: &BaseArn) -> Option<Difference> {
    let difference = |decides, text: &str, instead: Option<String>| {
        let text = text.to_owned();
        Some(Difference { decides, text, instead })
    };
    match rules {
        OldRules::Kiam1 => {
            difference(true, "kiam v1 does not read it; it counts from now on", None)
        }
        OldRules::Kube2iam(_) => {
            difference(true, "kube2iam does not read it; it counts from now on", None)
        }
        _ if everything(text) => None,
        OldRules::Kiam3 if !names_arns(text) => difference(
            true,
            "it is matched against the whole ARN from now on, not found in the name",
            whole(text, Some(base.as_ref())),
        ),
        OldRules::Kiam3 | OldRules::Kiam4 { strict: false } if !is_open(text) => difference(
            false,
            "it must match the whole ARN from now on, and is not only found in it",
            whole(text, None),
        ),
        OldRules::Kiam4 { strict: true } if has_alternatives(text) => difference(
            false,
            "each alternative must match the whole ARN: kiam v4 binds the first to the beginning alone, and the last to the end",
            None,
        ),
        _ => None,
    }
}

/// The difference for kube2iam's list.
pub(super) fn allowed_roles(text: &str, rules: &OldRules, base: &BaseArn) -> Option<Difference> {
    let difference = |decides, text: &str, instead| {
        let text = text.to_owned();
        Some(Difference { decides, text, instead })
    };
    let Some(Kube2iam { restricts, takes_expressions, .. }) = rules.kube2iam() else {
        return difference(true, "kiam does not read it; it counts from now on", None);
    };
    if !restricts {
        let text =
            "without --namespace-restrictions kube2iam does not read it; it counts from now on";
        return difference(true, text, None);
    }
    let globs: Vec<String> = serde_json::from_str(text).unwrap_or_default();
    if *takes_expressions {
        let text = "its expressions are globs from now on: put them into iam.amazonaws.com/permitted, and while kube2iam runs keep the list in an annotation that its --namespace-key names";
        return difference(true, text, expression_of(&globs, base.as_ref()));
    }
    if globs.iter().any(|glob| glob.contains('?')) {
        let text = "a ? stands for any one character from now on; in kube2iam it stands for itself";
        return difference(true, text, None);
    }
    let crosses = globs.iter().any(|glob| glob.contains('*'));
    let text = "a * ends at / and : from now on; list each depth, as in [\"*\", \"*/*\"]";
    if crosses { difference(false, text, None) } else { None }
}

/// Whether an expression matches everything.
fn everything(text: &str) -> bool {
    matches!(text.trim_start_matches('^').trim_end_matches('$'), ".*" | ".+")
}

/// Whether an expression is about ARNs, and not about names.
fn names_arns(text: &str) -> bool {
    let start = text.trim_start_matches(['^', '(']);
    start.starts_with("arn") || start.starts_with(".*") || start.starts_with(".+")
}

/// Whether an expression says itself that anything may stand before and after it, or that nothing may.
fn is_open(text: &str) -> bool {
    let begins = [".*", ".+", "^"].iter().any(|it| text.starts_with(it));
    let ends = [".*", ".+", "$"].iter().any(|it| text.ends_with(it));
    begins && ends && !has_alternatives(text)
}

fn has_alternatives(text: &str) -> bool {
    matches!(Parser::new().parse(text), Ok(Ast::Alternation(_)))
}

/// An expression for whole ARNs, of those below `base` if there is one, that stands for what `text` is found in. The old
/// agents read it as before, since both read it while nodes are changed over one by one. `None` if that is uncertain.
fn whole(text: &str, base: Option<&str>) -> Option<String> {
    let (from_start, body) = match text.strip_prefix('^') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let (to_end, body) = match body.strip_suffix('$') {
        Some(body) => (true, body),
        None => (false, body),
    };
    // An anchor that is left binds one alternative, and an escape may have been cut in two.
    let alternatives = has_alternatives(body);
    if body.contains(['^', '$']) || body.ends_with('\\') || (alternatives && (from_start || to_end))
    {
        return None;
    }
    let before = match (from_start, base.map(escaped)) {
        (true, Some(base)) => format!("^(?:{base})?"),
        (false, Some(base)) => format!("(?:{base}.*)?"),
        (true, None) => "^".to_owned(),
        (false, None) if body.starts_with(".*") => String::new(),
        (false, None) => ".*".to_owned(),
    };
    let after = match to_end {
        true => "$",
        false if body.ends_with(".*") => "",
        false => ".*",
    };
    let body = if alternatives { format!("(?:{body})") } else { body.to_owned() };
    let text = format!("{before}{body}{after}");
    PermittedRoles::parse(&text).is_ok().then_some(text)
}

/// One expression for those of a list. kube2iam completes each, and finds it anywhere in the ARN; this one matches the
/// same ARNs as a whole. `None` if that is uncertain.
fn expression_of(patterns: &[String], base: &str) -> Option<String> {
    let complete = |pattern: &String| match pattern.to_ascii_lowercase().starts_with("arn:") {
        true => pattern.clone(),
        false => format!("{}{pattern}", escaped(base)),
    };
    let found = |pattern: &String| {
        let text = complete(pattern);
        // By itself, so that a group around it cannot be closed early.
        PermittedRoles::parse(&text).ok()?;
        let whole = whole(&text, None)?;
        // An ARN has `arn:` nowhere but at its begin, and a pattern's own options end with its group.
        let whole = match whole.strip_prefix(".*arn:") {
            Some(rest) => format!("arn:{rest}"),
            None => whole,
        };
        Some(if pattern.contains("(?") { format!("(?:{whole})") } else { whole })
    };
    let alternatives: Option<Vec<String>> = patterns.iter().map(found).collect();
    let text = alternatives?.join("|");
    (!text.is_empty() && PermittedRoles::parse(&text).is_ok()).then_some(text)
}

/// `base` for an expression. Of the characters of ARNs, these mean something there.
fn escaped(base: &str) -> String {
    base.chars().fold(String::new(), |mut text, c| {
        if c == '.' || c == '+' {
            text.push('\\');
        }
        text.push(c);
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::meaning::old::DefaultRole;
    use kiam_core::{
        pods::annotations::{ALLOWED_ROLES, PERMITTED},
        role::RoleArn,
    };

    fn base() -> BaseArn {
        "arn:aws:iam::123456789012:role/".parse().unwrap()
    }

    fn instead(text: &str, rules: &OldRules) -> Option<Option<String>> {
        permitted(text, rules, &base()).map(|difference| difference.instead)
    }

    #[test]
    fn expressions_about_names_are_completed_to_arns() {
        for (text, expected) in [
            ("shop-.*", Some(Some("(?:BASE.*)?shop-.*"))),
            ("^shop-.*$", Some(Some("^(?:BASE)?shop-.*$"))),
            ("^shop$", Some(Some("^(?:BASE)?shop$"))),
            ("shop|orders", Some(Some("(?:BASE.*)?(?:shop|orders).*"))),
            ("^red.*$|^.red.*$", Some(None)),
            ("^a|b", Some(None)),
            (".*", None),
            ("^.*$", None),
            (".*reader", Some(Some(".*reader.*"))),
            ("^arn:aws:iam::123456789012:role/shop$", None),
        ] {
            let base = "arn:aws:iam::123456789012:role/";
            let expected = expected.map(|text| text.map(|text| text.replace("BASE", base)));
            assert_eq!(instead(text, &OldRules::Kiam3), expected, "{text}");
        }
    }

    #[test]
    fn what_is_written_instead_is_read_by_both_agents_as_kiam_reads_the_old_text() {
        let rules = OldRules::Kiam3;
        let allows = |text: &str, role: &str| {
            let annotations = [(PERMITTED.to_owned(), text.to_owned())].into();
            rules.allows(&annotations, role, &base())
        };
        for text in ["shop-.*", "^shop-.*$", "^shop$", "shop|orders", "shop", "(shop|team/orders)"]
        {
            let instead = instead(text, &rules).unwrap().unwrap();
            let mut allowed = 0;
            for role in ["shop", "shop-a", "x-shop-a", "orders", "team/orders", "team/shop-a", "x"]
            {
                let before = allows(text, role);
                allowed += u32::from(before);
                assert_eq!(allows(&instead, role), before, "kiam: {instead} {role}");
                let arn: RoleArn = format!("{}{role}", base()).parse().unwrap();
                let expression = PermittedRoles::parse(&instead).unwrap();
                assert_eq!(expression.matches(&arn), before, "{instead} {role}");
                let other: RoleArn =
                    format!("arn:aws:iam::999999999999:role/{role}").parse().unwrap();
                assert!(!expression.matches(&other), "{instead} allows another account's {role}");
            }
            assert!((1..7).contains(&allowed), "{text}");
        }
    }

    #[test]
    fn v4_differs_in_alternatives_and_without_strictness() {
        let strict = OldRules::Kiam4 { strict: true };
        assert_eq!(instead("arn:aws:iam::123456789012:role/shop", &strict), None);
        assert_eq!(instead("a|b", &strict), Some(None));
        assert_eq!(instead("(a|b)", &strict), None);
        let lax = OldRules::Kiam4 { strict: false };
        assert_eq!(instead("role/shop", &lax), Some(Some(".*role/shop.*".to_owned())));
        assert_eq!(instead(".*role/shop.*", &lax), None);
    }

    #[test]
    fn lists_differ_by_their_format() {
        let rules = |restricts, takes_expressions| {
            OldRules::Kube2iam(Kube2iam {
                restricts,
                takes_expressions,
                default_role: DefaultRole::Absent,
                role_key: String::new(),
                namespace_key: String::new(),
            })
        };
        let found = |text: &str, rules: &OldRules| allowed_roles(text, rules, &base());
        let decides = |text: &str, rules| found(text, &rules).map(|it| it.decides);
        assert_eq!(decides(r#"["reader"]"#, rules(true, false)), None);
        assert_eq!(decides(r#"["team/*"]"#, rules(true, false)), Some(false));
        assert_eq!(decides(r#"["reade?"]"#, rules(true, false)), Some(true));
        assert_eq!(decides(r#"["reader"]"#, rules(false, false)), Some(true));
        assert_eq!(decides(r#"["reader"]"#, OldRules::Kiam3), Some(true));
        let expressions = found(r#"["team/.*", "arn:aws:iam::9:role/x"]"#, &rules(true, true));
        let expected = "arn:aws:iam::123456789012:role/team/.*|arn:aws:iam::9:role/x.*";
        assert_eq!(expressions.unwrap().instead.as_deref(), Some(expected));
    }

    #[test]
    fn what_is_written_instead_of_a_list_means_the_same() {
        let rules = OldRules::Kube2iam(Kube2iam {
            restricts: true,
            takes_expressions: true,
            default_role: DefaultRole::Absent,
            role_key: String::new(),
            namespace_key: ALLOWED_ROLES.to_owned(),
        });
        for list in [
            r#"["read"]"#,
            r#"["read$"]"#,
            r#"["read", "team/.*"]"#,
            r#"["read|write"]"#,
            r#"["(read|write)$", "x"]"#,
            r#"["(?i)READ", "x"]"#,
            r#"["arn:aws:iam::123456789012:role/read"]"#,
            r#"["arn:aws:iam::\\d+:role/(a|read)$"]"#,
        ] {
            let instead = allowed_roles(list, &rules, &base()).unwrap().instead.unwrap();
            let expression = PermittedRoles::parse(&instead).unwrap();
            let (mut allowed, mut refused) = (0, 0);
            for account in ["123456789012", "999999999999"] {
                for name in ["read", "reader", "xread", "team/read", "READ", "write", "x", "a", "b"]
                {
                    let role = format!("arn:aws:iam::{account}:role/{name}");
                    let annotations = [(ALLOWED_ROLES.to_owned(), list.to_owned())].into();
                    let before = rules.allows(&annotations, &role, &base());
                    *(if before { &mut allowed } else { &mut refused }) += 1;
                    let arn: RoleArn = role.parse().unwrap();
                    assert_eq!(expression.matches(&arn), before, "{list}: {instead}: {role}");
                }
            }
            assert!(allowed > 0 && refused > 0, "{list}");
        }
        // An anchor that binds one alternative, and what is no expression.
        for list in [r#"["read$|write"]"#, r#"["^read"]"#, r#"["("]"#, r#"["a)|(b"]"#, "[]", "x"] {
            let found = allowed_roles(list, &rules, &base()).unwrap();
            assert_eq!(found.instead, None, "{list}");
        }
    }
}

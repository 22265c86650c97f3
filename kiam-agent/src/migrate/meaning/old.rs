//! The rules of kiam and kube2iam: which role a pod may have by the annotations of its namespace.

use std::collections::BTreeMap;

use crate::{migrate::installation::Installation, peers::Program};
use kiam_core::{
    pods::annotations::{ALLOWED_ROLES, PERMITTED, ROLE},
    policy::PermittedRoles,
    role::{BaseArn, RoleResolver},
};

type Annotations = BTreeMap<String, String>;

/// The rules of the old installation.
#[derive(Clone, Debug)]
pub(super) enum OldRules {
    /// kiam v1: every role.
    Kiam1,
    /// kiam v2 and v3: the expression is found somewhere in the role, as the pod names it.
    Kiam3,
    /// kiam v4: the expression is found in the ARN; with `strict` between `^` and `$`, put before and after its text.
    Kiam4 { strict: bool },
    /// kube2iam.
    Kube2iam(Kube2iam),
}

/// The rules of kube2iam.
#[derive(Clone, Debug)]
pub(super) struct Kube2iam {
    /// `--namespace-restrictions`.
    pub(super) restricts: bool,
    /// `--namespace-restriction-format=regexp`.
    pub(super) takes_expressions: bool,
    /// The role of pods that name none.
    pub(super) default_role: DefaultRole,
    pub(super) role_key: String,
    pub(super) namespace_key: String,
}

/// The role of pods that name none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DefaultRole {
    Absent,
    Named(String),
    /// The node's own.
    Node,
}

// === impl OldRules ===

impl OldRules {
    /// `None` if the version of kiam does not show.
    pub(super) fn of(installation: &Installation) -> Option<Self> {
        let value = |name: &str| installation.value(name).filter(|value| !value.is_empty());
        if installation.part(Program::Kube2iam).is_some() {
            let default_role = match value("default-role") {
                _ if installation.has("auto-discover-default-role") => DefaultRole::Node,
                Some(role) => DefaultRole::Named(role.to_owned()),
                None => DefaultRole::Absent,
            };
            let format = value("namespace-restriction-format").unwrap_or_default();
            return Some(Self::Kube2iam(Kube2iam {
                restricts: installation.has("namespace-restrictions"),
                takes_expressions: format.eq_ignore_ascii_case("regexp"),
                default_role,
                role_key: value("iam-role-key").unwrap_or(ROLE).to_owned(),
                namespace_key: value("namespace-key").unwrap_or(ALLOWED_ROLES).to_owned(),
            }));
        }
        match installation.version?.0 {
            1 => Some(Self::Kiam1),
            2 | 3 => Some(Self::Kiam3),
            _ => {
                let strict = !installation.has("disable-strict-namespace-regexp");
                Some(Self::Kiam4 { strict })
            }
        }
    }

    pub(super) fn kube2iam(&self) -> Option<&Kube2iam> {
        match self {
            Self::Kube2iam(rules) => Some(rules),
            _ => None,
        }
    }

    /// The annotation that names a pod's role.
    pub(super) fn role_key(&self) -> &str {
        self.kube2iam().map_or(ROLE, |rules| &rules.role_key)
    }

    /// Whether a pod in a namespace with these annotations may have `role`, named as in the pod's annotation.
    pub(super) fn allows(&self, namespace: &Annotations, role: &str, base: &BaseArn) -> bool {
        let permitted = namespace.get(PERMITTED).map_or("", String::as_str);
        match self {
            Self::Kiam1 => true,
            Self::Kiam3 => finds(permitted, role),
            Self::Kiam4 { strict } => {
                let resolver = RoleResolver::new(Some(base.clone()));
                let Ok(arn) = resolver.resolve(role) else { return false };
                // kiam compiles nothing that is not valid by itself, either.
                let expression =
                    if *strict { format!("^{permitted}$") } else { permitted.to_owned() };
                !permitted.is_empty() && finds(&expression, arn.as_ref())
            }
            Self::Kube2iam(rules) => rules.allows(namespace, role, base.as_ref()),
        }
    }
}

// === impl Kube2iam ===

impl Kube2iam {
    fn allows(&self, namespace: &Annotations, role: &str, base: &str) -> bool {
        let role = completed(role, base);
        if let DefaultRole::Named(default) = &self.default_role
            && completed(default, base) == role
        {
            return true;
        }
        if !self.restricts {
            return true;
        }
        let list = namespace.get(&self.namespace_key).map_or("", String::as_str);
        let patterns: Vec<String> = serde_json::from_str(list).unwrap_or_default();
        patterns.iter().map(|pattern| completed(pattern, base)).any(|pattern| {
            if self.takes_expressions { finds(&pattern, &role) } else { glob(&pattern, &role) }
        })
    }
}

/// `role` with the base before it, unless it begins as an ARN.
fn completed(role: &str, base: &str) -> String {
    if role.to_ascii_lowercase().starts_with("arn:") {
        role.to_owned()
    } else {
        format!("{base}{role}")
    }
}

/// Whether Go's `regexp` finds `expression` in `text`. An expression that is not valid is found nowhere.
fn finds(expression: &str, text: &str) -> bool {
    if expression.is_empty() {
        return false;
    }
    // Valid by itself, so that the group around it cannot be closed early.
    PermittedRoles::parse(expression).is_ok()
        && PermittedRoles::parse(&format!("(?s:.*)(?:{expression})(?s:.*)"))
            .is_ok_and(|whole| whole.matches_text(text))
}

/// Whether kube2iam's glob matches the whole text: a `*` stands for any text, and everything else for itself.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(rest) = parts.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    let mut rest = rest;
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> BaseArn {
        "arn:aws:iam::123456789012:role/".parse().unwrap()
    }

    fn with(annotation: &str, value: &str) -> Annotations {
        [(annotation.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn kiams_versions_read_permitted_as_they_do() {
        let arn = "arn:aws:iam::123456789012:role/reader";
        let (v3, v4) = (OldRules::Kiam3, OldRules::Kiam4 { strict: true });
        let lax = OldRules::Kiam4 { strict: false };
        // Expression, the pod's role, and whether v3, v4 and v4 with --disable-strict-namespace-regexp allow it.
        let cases = [
            (".*", "reader", [true, true, true]),
            ("", "reader", [false, false, false]),
            ("reader", "reader", [true, false, true]),
            ("read", "reader", [true, false, true]),
            ("^reader$", "reader", [true, false, false]),
            (".*:role/reader", "reader", [false, true, true]),
            (arn, "reader", [false, true, true]),
            (arn, arn, [true, true, true]),
            // `^writer|reader$`
            ("writer|reader", "reader", [true, true, true]),
            ("arn:aws|writer", "reader", [false, true, true]),
            ("(", "reader", [false, false, false]),
        ];
        for (expression, role, expected) in cases {
            let namespace = with(PERMITTED, expression);
            let found = [&v3, &v4, &lax].map(|rules| rules.allows(&namespace, role, &base()));
            assert_eq!(found, expected, "{expression} {role}");
        }
        assert!(OldRules::Kiam1.allows(&Annotations::new(), "reader", &base()));
    }

    #[test]
    fn kube2iam_reads_allowed_roles_as_it_does() {
        let rules = |restricts, takes_expressions| {
            OldRules::Kube2iam(Kube2iam {
                restricts,
                takes_expressions,
                default_role: DefaultRole::Named("fallback".to_owned()),
                role_key: ROLE.to_owned(),
                namespace_key: ALLOWED_ROLES.to_owned(),
            })
        };
        let cases = [
            (r#"["*"]"#, "team/eu/reader", true),
            (r#"["team/*"]"#, "team/eu/reader", true),
            (r#"["team*r"]"#, "team/eu/reader", true),
            (r#"["*eu*read*"]"#, "team/eu/reader", true),
            (r#"["read"]"#, "reader", false),
            (r#"["reade?"]"#, "reader", false),
            (r#"["arn:aws:iam::*:role/reader"]"#, "reader", true),
            (r#"["arn:aws:iam::*"]"#, "reader", true),
            ("reader", "reader", false),
            ("", "reader", false),
            (r#"["writer"]"#, "fallback", true),
        ];
        for (list, role, expected) in cases {
            let namespace = with(ALLOWED_ROLES, list);
            assert_eq!(rules(true, false).allows(&namespace, role, &base()), expected, "{list}");
            assert!(rules(false, false).allows(&namespace, role, &base()), "{list}");
        }
        let found = |list: &str, role: &str| {
            rules(true, true).allows(&with(ALLOWED_ROLES, list), role, &base())
        };
        assert!(found(r#"["team/.*"]"#, "team/reader") && found(r#"["read"]"#, "reader"));
        assert!(!found(r#"["team/.*"]"#, "reader") && !found(r#"["("]"#, "reader"));
    }
}

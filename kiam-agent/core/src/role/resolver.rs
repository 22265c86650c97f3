//! Resolves the role of an annotation to an ARN, as kiam does.

use std::{fmt, str::FromStr, sync::Arc};

use super::{InvalidRole, QuotedText, RoleArn, RoleProblem, arn};

/// The prefix of short names: `arn:aws:iam::123456789012:role/`, and maybe more.
///
/// The prefix is used as it is, as in kiam, so that `…:role/team/` means a path and `…:role/prod-` a
/// common beginning of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseArn(Arc<str>);

/// Resolves short names of roles to ARNs.
#[derive(Clone, Debug)]
pub struct RoleResolver {
    base: Option<BaseArn>,
}

// === impl BaseArn ===

impl BaseArn {
    /// `aws`, `aws-cn`, `aws-us-gov`, …
    #[must_use]
    pub fn partition(&self) -> &str {
        self.0.split(':').nth(1).unwrap_or_default()
    }
}

impl FromStr for BaseArn {
    type Err = InvalidRole;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        arn::check_base(text)
            .map(|()| Self(text.into()))
            .map_err(|problem| InvalidRole { text: QuotedText::new(text), problem })
    }
}

impl AsRef<str> for BaseArn {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BaseArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl RoleResolver ===

impl RoleResolver {
    /// A resolver that puts `base` before short names. Without a base only full ARNs are roles.
    #[must_use]
    pub fn new(base: Option<BaseArn>) -> Self {
        Self { base }
    }

    /// The role that `text` names: a full ARN of any account as it is, else the base followed by `text` without a leading
    /// slash.
    ///
    /// # Errors
    ///
    /// [`InvalidRole`], with `text`, when the outcome is not the ARN of a role.
    pub fn resolve(&self, text: &str) -> Result<RoleArn, InvalidRole> {
        let invalid = |problem| InvalidRole { text: QuotedText::new(text), problem };
        let (base, rest) = self.complete(text).map_err(invalid)?;
        let base = base.map_or("", AsRef::as_ref);
        format!("{base}{rest}").parse().map_err(|error: InvalidRole| invalid(error.problem))
    }

    /// The base that completes `text`, and the part of `text` that follows it. Text that begins as an ARN has no base.
    ///
    /// # Errors
    ///
    /// The [`RoleProblem`] of `text`, as far as it shows without the rest.
    pub fn complete<'a>(
        &'a self,
        text: &'a str,
    ) -> Result<(Option<&'a BaseArn>, &'a str), RoleProblem> {
        if text.is_empty() {
            return Err(RoleProblem::Empty);
        }
        if text.len() > arn::MAX_ARN {
            return Err(RoleProblem::Length);
        }
        // Text that begins as an ARN is never a short name: nobody means `role/arn:…`.
        let name = text.strip_prefix('/').unwrap_or(text);
        if arn::begins(name) {
            return Ok((None, text));
        }
        let base = self.base.as_ref().ok_or(RoleProblem::NoBase)?;
        Ok((Some(base), name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_as_in_kiam() {
        let base = "arn:aws:iam::123456789012:role/";
        let team = "arn:aws-cn:iam::123456789012:role/team/";
        let prefix = "arn:aws:iam::123456789012:role/prod-";
        let other = "arn:aws:iam::999999999999:role/elsewhere/reader";
        let cases = [
            (base, "reader", "arn:aws:iam::123456789012:role/reader"),
            (base, "/reader", "arn:aws:iam::123456789012:role/reader"),
            (base, "team/reader", "arn:aws:iam::123456789012:role/team/reader"),
            (base, "/team/reader", "arn:aws:iam::123456789012:role/team/reader"),
            (base, other, other),
            (team, "reader", "arn:aws-cn:iam::123456789012:role/team/reader"),
            (team, other, other),
            (prefix, "reader", "arn:aws:iam::123456789012:role/prod-reader"),
        ];
        for (base, text, arn) in cases {
            let resolver = RoleResolver::new(Some(base.parse().unwrap()));
            assert_eq!(resolver.resolve(text).unwrap().as_ref(), arn, "{base} {text}");
        }
    }

    #[test]
    fn what_names_no_role_is_refused_as_it_was_written() {
        let resolver = RoleResolver::new(Some("arn:aws:iam::123456789012:role/".parse().unwrap()));
        let cases = [
            ("", RoleProblem::Empty),
            ("/", RoleProblem::Name),
            ("//reader", RoleProblem::Path),
            ("team/", RoleProblem::Name),
            ("rea der", RoleProblem::Name),
            ("reader\r\nX-Evil: 1", RoleProblem::Name),
            ("arn:", RoleProblem::Form),
            ("ARN:aws:iam::123456789012:role/reader", RoleProblem::Form),
            ("Arn:aws:iam::123456789012:role/team/reader", RoleProblem::Form),
            ("/arn:aws:iam::123456789012:role/reader", RoleProblem::Form),
            ("arn:aws:iam::x:role/reader", RoleProblem::Account),
            ("arn:aws:iam::123456789012:reader", RoleProblem::Resource),
        ];
        for (text, problem) in cases {
            let error = resolver.resolve(text).unwrap_err();
            assert_eq!((&error.text, error.problem), (&QuotedText::new(text), problem));
        }
    }

    #[test]
    fn short_names_need_a_base_and_full_arns_do_not() {
        let resolver = RoleResolver::new(None);
        assert_eq!(resolver.resolve("reader").unwrap_err().problem, RoleProblem::NoBase);
        resolver.resolve("arn:aws:iam::123456789012:role/reader").unwrap();
    }

    #[test]
    fn malformed_bases_are_refused() {
        let cases = [
            ("", RoleProblem::Form),
            ("reader", RoleProblem::Form),
            ("arn:aws:iam::123456789012:role", RoleProblem::Resource),
            ("arn:aws:iam::account-id:role/", RoleProblem::Account),
            ("arn:aws:iam::123456789012:role//", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role//", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role//team", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role/a//b/", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role/a b/", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role/ ", RoleProblem::Beginning),
            ("arn:aws:iam::123456789012:role/<role-name>", RoleProblem::Beginning),
            ("arn:aws:iam::123456789012:role/*", RoleProblem::Beginning),
            ("arn:aws:iam::123456789012:role/team/$(PREFIX)", RoleProblem::Beginning),
            ("ARN:aws:iam::123456789012:role/", RoleProblem::Form),
        ];
        for (text, problem) in cases {
            assert_eq!(text.parse::<BaseArn>().unwrap_err().problem, problem, "{text:?}");
        }
        let long = |length| format!("arn:aws:iam::123456789012:role/{}", "p".repeat(length));
        assert_eq!(long(64).parse::<BaseArn>().unwrap_err().problem, RoleProblem::Beginning);
        for good in
            ["arn:aws:iam::123456789012:role/a:b/<c>/", "arn:aws:iam::1:role/x_+=,.@-", &long(63)]
        {
            assert!(good.parse::<BaseArn>().is_ok(), "{good}");
        }
    }
}

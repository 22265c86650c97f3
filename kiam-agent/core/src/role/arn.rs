//! The ARN of an IAM role.

use std::{fmt, str::FromStr, sync::Arc};

use super::QuotedText;

/// Longest `RoleArn` of AssumeRole, in characters. A well-formed one is never too short.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>
pub(super) const MAX_ARN: usize = 2048;

/// Accounts have 12 digits, partitions at most 10 characters. AWS promises neither, so that there is room for more, but
/// not so much that matching against globs takes long.
const MAX_ACCOUNT: usize = 20;
const MAX_PARTITION: usize = 32;

/// Longest role name and longest path with both its slashes.
/// <https://docs.aws.amazon.com/IAM/latest/APIReference/API_Role.html>
const MAX_NAME: usize = 64;
const MAX_PATH: usize = 512;

/// A complete, well-formed ARN of an IAM role, such as `arn:aws:iam::123456789012:role/team/reader`.
///
/// It is printable ASCII without spaces.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleArn(Arc<str>);

/// Text that is not a role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("role {text} is invalid: {problem}")]
pub struct InvalidRole {
    /// The text, as written.
    pub text: QuotedText,
    /// What is wrong with it.
    pub problem: RoleProblem,
}

/// What is wrong with the text of a role. The message says what is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoleProblem {
    /// Nothing is written.
    #[error("it is empty")]
    Empty,
    /// Too short or too long for STS.
    #[error("an ARN has 20 to 2048 characters")]
    Length,
    /// Not six fields.
    #[error("an ARN reads arn:<partition>:iam::<account>:role/<name>")]
    Form,
    /// The second field.
    #[error("the partition is aws, aws-cn, aws-us-gov or another aws-…")]
    Partition,
    /// The third field.
    #[error("the service is iam")]
    Service,
    /// The fourth field.
    #[error("the region is empty, since IAM has none")]
    Region,
    /// The fifth field.
    #[error("the account is 1 to {MAX_ACCOUNT} digits")]
    Account,
    /// The sixth field is something else than a role.
    #[error("the resource starts with role/")]
    Resource,
    /// Between `role/` and the name.
    #[error("a path is at most 512 printable ASCII characters, without // in it")]
    Path,
    /// After the last slash of a base.
    #[error(
        "what follows the last slash is put before each name, and is at most {} of A-Z a-z 0-9 _ + = , . @ -",
        MAX_NAME - 1
    )]
    Beginning,
    /// After the last slash.
    #[error("a role's name is 1 to 64 of A-Z a-z 0-9 _ + = , . @ -")]
    Name,
    /// A short name, and no base to put before it.
    #[error("a short name needs --role-base-arn; write the full ARN, or set the flag")]
    NoBase,
}

// === impl RoleArn ===

impl RoleArn {
    /// `aws`, `aws-cn`, `aws-us-gov`, …
    #[must_use]
    pub fn partition(&self) -> &str {
        self.field(1)
    }

    /// The account, as digits.
    #[must_use]
    pub fn account(&self) -> &str {
        self.field(4)
    }

    /// The part after `role/`: `team/reader`, or only the name when there is no path.
    #[must_use]
    pub fn path_and_name(&self) -> &str {
        self.field(5).strip_prefix("role/").unwrap_or_default()
    }

    /// The last segment: `reader`. This is what the metadata service lists.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map(|(_, name)| name).unwrap_or_default()
    }

    fn field(&self, index: usize) -> &str {
        self.0.splitn(6, ':').nth(index).unwrap_or_default()
    }
}

impl FromStr for RoleArn {
    type Err = InvalidRole;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        check(text)
            .map(|()| Self(text.into()))
            .map_err(|problem| InvalidRole { text: QuotedText::new(text), problem })
    }
}

impl AsRef<str> for RoleArn {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The part after `arn:<partition>:iam::<account>:role/`, unchecked.
pub(super) fn after_role(text: &str) -> Result<&str, RoleProblem> {
    let mut parts = text.splitn(6, ':');
    let mut field = || parts.next().ok_or(RoleProblem::Form);
    if field()? != "arn" {
        return Err(RoleProblem::Form);
    }
    let [partition, service, region] = [field()?, field()?, field()?];
    let [account, resource] = [field()?, field()?];
    if !is_partition(partition) {
        return Err(RoleProblem::Partition);
    }
    if service != "iam" {
        return Err(RoleProblem::Service);
    }
    if !region.is_empty() {
        return Err(RoleProblem::Region);
    }
    let length = 1..=MAX_ACCOUNT;
    if !length.contains(&account.len()) || !account.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(RoleProblem::Account);
    }
    resource.strip_prefix("role/").ok_or(RoleProblem::Resource)
}

fn check(text: &str) -> Result<(), RoleProblem> {
    if text.is_empty() {
        return Err(RoleProblem::Empty);
    }
    if text.len() > MAX_ARN {
        return Err(RoleProblem::Length);
    }
    let resource = after_role(text)?;
    let (path, name) = resource.rsplit_once('/').unwrap_or(("", resource));
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_name_byte) {
        return Err(RoleProblem::Name);
    }
    check_path(path)?;
    // One slash alone before the name is an empty path segment too.
    if path.is_empty() && resource.contains('/') {
        return Err(RoleProblem::Path);
    }
    Ok(())
}

/// Checks the path: the part between `role/` and the slash before the name.
fn check_path(path: &str) -> Result<(), RoleProblem> {
    // Both slashes around the path count.
    let long = path.len() + 2 > MAX_PATH;
    let empty_segment = path.starts_with('/') || path.contains("//") || path.ends_with('/');
    if long || empty_segment || !is_printable(path) { Err(RoleProblem::Path) } else { Ok(()) }
}

/// Checks the beginning of a role's ARN, after which there must be room for a name.
pub(super) fn check_base(text: &str) -> Result<(), RoleProblem> {
    let rest = after_role(text)?;
    let (path, beginning) = match rest.rsplit_once('/') {
        Some(("", _)) => return Err(RoleProblem::Path),
        Some((path, beginning)) => (path, beginning),
        None => ("", rest),
    };
    check_path(path)?;
    let good = beginning.len() < MAX_NAME && beginning.bytes().all(is_name_byte);
    if good { Ok(()) } else { Err(RoleProblem::Beginning) }
}

/// Whether `text` begins as an ARN, in whatever case. Such text is never a short name.
pub(super) fn begins(text: &str) -> bool {
    text.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("arn:"))
}

/// Whether `text` is `aws` or another partition that AWS may add: `aws-cn`, `aws-us-gov`, `aws-iso`, `aws-iso-b`, `aws-eusc`, …
pub(super) fn is_partition(text: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let mut words = text.split('-');
    text.len() <= MAX_PARTITION && words.next() == Some("aws") && words.all(is_word)
}

/// Whether `text` is printable ASCII without spaces.
pub(super) fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Whether `byte` is one of `[\w+=,.@-]`, where AWS's `\w` is ASCII.
pub(super) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_+=,.@-".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_arns_are_taken_apart() {
        let cases = [
            ("arn:aws:iam::123456789012:role/reader", "aws", "123456789012", "reader", "reader"),
            ("arn:aws:iam::1:role/a/b/c.d@e", "aws", "1", "a/b/c.d@e", "c.d@e"),
            ("arn:aws-cn:iam::123456789012:role/r", "aws-cn", "123456789012", "r", "r"),
            ("arn:aws-us-gov:iam::12:role/r", "aws-us-gov", "12", "r", "r"),
            ("arn:aws-iso-b:iam::12:role/r", "aws-iso-b", "12", "r", "r"),
            ("arn:aws:iam::12345678901234567890:role/r", "aws", "12345678901234567890", "r", "r"),
            ("arn:aws-eusc:iam::12:role/a:b/r", "aws-eusc", "12", "a:b/r", "r"),
        ];
        for (text, partition, account, path_and_name, name) in cases {
            let arn: RoleArn = text.parse().unwrap();
            assert_eq!(arn.to_string(), text);
            assert_eq!(arn.as_ref(), text);
            assert_eq!(
                (arn.partition(), arn.account(), arn.path_and_name(), arn.name()),
                (partition, account, path_and_name, name)
            );
        }
    }

    #[test]
    fn malformed_arns_are_refused_with_the_reason() {
        let long_name = format!("arn:aws:iam::123456789012:role/{}", "r".repeat(65));
        let long_path = format!("arn:aws:iam::123456789012:role/{}/r", "p".repeat(511));
        let long_account = format!("arn:aws:iam::{}:role/reader", "1".repeat(21));
        let long_partition = format!("arn:aws-{}:iam::123456789012:role/reader", "a".repeat(29));
        let long = format!("arn:aws:iam::123456789012:role/{}/r", "p".repeat(2048));
        let cases = [
            ("", RoleProblem::Empty),
            ("reader", RoleProblem::Form),
            ("arn", RoleProblem::Form),
            ("arn:", RoleProblem::Form),
            ("arn:aws:iam::123456789012", RoleProblem::Form),
            ("ARN:aws:iam::123456789012:role/reader", RoleProblem::Form),
            (" arn:aws:iam::123456789012:role/reader", RoleProblem::Form),
            ("arn::iam::123456789012:role/reader", RoleProblem::Partition),
            ("arn:awsome:iam::123456789012:role/reader", RoleProblem::Partition),
            ("arn:aws-:iam::123456789012:role/reader", RoleProblem::Partition),
            ("arn:aws-CN:iam::123456789012:role/reader", RoleProblem::Partition),
            ("arn:aws:sts::123456789012:role/reader", RoleProblem::Service),
            ("arn:aws:iam:eu-west-1:123456789012:role/reader", RoleProblem::Region),
            ("arn:aws:iam:::role/reader-reader", RoleProblem::Account),
            ("arn:aws:iam::12345678901x:role/reader", RoleProblem::Account),
            ("arn:aws:iam::١٢٣:role/reader", RoleProblem::Account),
            ("arn:aws:iam::123456789012:user/reader", RoleProblem::Resource),
            ("arn:aws:iam::123456789012:role", RoleProblem::Resource),
            ("arn:aws:iam::123456789012:role/", RoleProblem::Name),
            ("arn:aws:iam::123456789012:role/team/", RoleProblem::Name),
            ("arn:aws:iam::123456789012:role/rea der", RoleProblem::Name),
            ("arn:aws:iam::123456789012:role/reader\n", RoleProblem::Name),
            ("arn:aws:iam::123456789012:role/lecteur-é", RoleProblem::Name),
            ("arn:aws:iam::123456789012:role/reader*", RoleProblem::Name),
            ("arn:aws:iam::123456789012:role//reader", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role/a//reader", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role/a b/reader", RoleProblem::Path),
            ("arn:aws:iam::123456789012:role/é/reader", RoleProblem::Path),
            (&long_name, RoleProblem::Name),
            (&long_path, RoleProblem::Path),
            (&long_account, RoleProblem::Account),
            (&long_partition, RoleProblem::Partition),
            (&long, RoleProblem::Length),
        ];
        for (text, problem) in cases {
            let error = text.parse::<RoleArn>().unwrap_err();
            assert_eq!(error.problem, problem, "{text:?}");
        }
    }

    #[test]
    fn error_names_the_value_and_what_is_right() {
        let error = "arn:aws:iam::12x:role/reader".parse::<RoleArn>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "role \"arn:aws:iam::12x:role/reader\" is invalid: the account is 1 to 20 digits"
        );
    }

    #[test]
    fn no_text_makes_the_parser_panic() {
        let alphabet = ["arn", ":", "aws", "-", "iam", "role", "/", "1", "é", "\0", "\u{202e}", ""];
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let text: String =
                (0..random.usize(..14)).map(|_| alphabet[random.usize(..alphabet.len())]).collect();
            if let Ok(arn) = text.parse::<RoleArn>() {
                assert!(!arn.name().is_empty() && !arn.account().is_empty());
            }
        }
    }
}

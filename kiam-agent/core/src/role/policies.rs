//! Managed policies that bound a session.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use super::{
    QuotedText,
    arn::{is_name_byte, is_partition, is_printable},
};

/// Longest `PolicyArns.member.N.arn`, in characters.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_PolicyDescriptorType.html>
const MAX_ARN: usize = 2048;

/// Most policies of a session: <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html>
const MOST: usize = 10;

/// The longest list: that many ARNs of that length, with commas. A longer one is rejected without parsing.
const MAX_LIST: usize = MOST * (MAX_ARN + 1);

/// The ARN of a managed policy, AWS's or an account's own: `arn:aws:iam::aws:policy/ReadOnlyAccess`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyArn(Arc<str>);

/// At most ten managed policies, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionPolicies(Arc<BTreeSet<PolicyArn>>);

/// Text that names no session policies.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPolicies {
    /// An item is not the ARN of a managed policy.
    #[error(
        "policy {0} is invalid: it reads arn:<partition>:iam::<account>:policy/<name>, with aws as the account of AWS's own"
    )]
    Arn(QuotedText),
    /// The list has too many policies.
    #[error("{0} policies are too many: a session takes at most {MOST}")]
    Count(usize),
    /// The list is longer than any valid one.
    #[error("the list is longer than {MAX_LIST} bytes, the longest that {MOST} policies can have")]
    Length,
}

// === impl PolicyArn ===

impl FromStr for PolicyArn {
    type Err = InvalidPolicies;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() <= MAX_ARN && is_policy(text) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidPolicies::Arn(QuotedText::new(text)))
        }
    }
}

impl AsRef<str> for PolicyArn {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PolicyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_policy(text: &str) -> bool {
    let mut fields = text.splitn(6, ':');
    let mut field = || fields.next().unwrap_or_default();
    let [arn, partition, service, region, account, resource] =
        [field(), field(), field(), field(), field(), field()];
    let owner = account == "aws"
        || !account.is_empty() && account.bytes().all(|byte| byte.is_ascii_digit());
    let named = resource.strip_prefix("policy/").is_some_and(|path| {
        let name = path.rsplit('/').next().unwrap_or_default();
        let segments = path.split('/').all(|segment| !segment.is_empty());
        segments
            && is_printable(path)
            && (1..=128).contains(&name.len())
            && name.bytes().all(is_name_byte)
    });
    let iam = arn == "arn" && is_partition(partition) && service == "iam" && region.is_empty();
    iam && owner && named
}

// === impl SessionPolicies ===

impl SessionPolicies {
    /// A set of these policies. Duplicates count once.
    ///
    /// # Errors
    ///
    /// [`InvalidPolicies::Count`].
    pub fn new(policies: impl IntoIterator<Item = PolicyArn>) -> Result<Self, InvalidPolicies> {
        let policies: BTreeSet<_> = policies.into_iter().collect();
        if policies.len() > MOST {
            return Err(InvalidPolicies::Count(policies.len()));
        }
        Ok(Self(Arc::new(policies)))
    }

    /// Whether the session may do all that its role may.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each policy.
    pub fn iter(&self) -> impl Iterator<Item = &PolicyArn> {
        self.0.iter()
    }
}

impl FromStr for SessionPolicies {
    type Err = InvalidPolicies;

    /// Parses a list with commas. Spaces around the items are ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > MAX_LIST {
            return Err(InvalidPolicies::Length);
        }
        let policies: Result<Vec<PolicyArn>, _> =
            text.split(',').map(|part| part.trim().parse()).collect();
        Self::new(policies?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: &str = "arn:aws:iam::aws:policy/ReadOnlyAccess";
    const OWN: &str = "arn:aws-cn:iam::123456789012:policy/team/bounds";

    #[test]
    fn lists_are_read_in_any_order_and_hold_each_policy_once() {
        let policies: SessionPolicies = format!("{OWN}, {READ},{OWN}").parse().unwrap();
        let held: Vec<&str> = policies.iter().map(AsRef::as_ref).collect();
        assert_eq!(held, [OWN, READ]);
        assert_eq!(Ok(policies), format!("{READ},{OWN}").parse());
        assert!(SessionPolicies::default().is_empty());
    }

    #[test]
    fn what_is_no_managed_policy_is_refused_with_its_value() {
        let long = format!("arn:aws:iam::aws:policy/{}", "p".repeat(129));
        for text in [
            "",
            "ReadOnlyAccess",
            "arn:aws:iam::aws:role/ReadOnlyAccess",
            "arn:aws:iam::aws:policy/",
            "arn:aws:iam::aws:policy//x",
            "arn:aws:iam::aws:policy/x y",
            "arn:aws:iam:eu-west-1:aws:policy/x",
            "arn:aws:s3::aws:policy/x",
            "arn:azure:iam::aws:policy/x",
            "arn:aws:iam::anybody:policy/x",
            "arn:aws:iam:::policy/x",
            &long,
        ] {
            let error = format!("{READ},{text}").parse::<SessionPolicies>().unwrap_err();
            assert_eq!(error, InvalidPolicies::Arn(QuotedText::new(text)));
        }
    }

    #[test]
    fn ten_policies_are_the_most() {
        let list = |count: usize| {
            let one = |n| format!("arn:aws:iam::aws:policy/P{n}");
            (0..count).map(one).collect::<Vec<_>>().join(",")
        };
        assert_eq!(list(10).parse::<SessionPolicies>().unwrap().iter().count(), 10);
        assert_eq!(list(11).parse::<SessionPolicies>(), Err(InvalidPolicies::Count(11)));
    }
    #[test]
    fn a_long_list_is_refused_unread() {
        let (name, rest) = ("a".repeat(120), MAX_ARN - "arn:aws:iam::aws:policy//0".len() - 120);
        let one = |n| format!("arn:aws:iam::aws:policy/{}/{name}{n}", "p".repeat(rest));
        let longest = (0..10).map(one).collect::<Vec<_>>().join(",");
        assert_eq!(longest.parse::<SessionPolicies>().unwrap().iter().count(), 10);
        for list in [format!("{READ},").repeat(6_000), "?".repeat(MAX_LIST + 1)] {
            assert_eq!(list.parse::<SessionPolicies>(), Err(InvalidPolicies::Length));
        }
    }
}

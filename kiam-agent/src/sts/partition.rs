//! The AWS partition of a region.

/// The prefixes of regions outside of the partition `aws`, as in the SDK's endpoint rules.
const BEGINNINGS: [(&str, &str); 7] = [
    ("cn-", "aws-cn"),
    ("eu-isoe-", "aws-iso-e"),
    ("eusc-", "aws-eusc"),
    ("us-gov-", "aws-us-gov"),
    ("us-iso-", "aws-iso"),
    ("us-isob-", "aws-iso-b"),
    ("us-isof-", "aws-iso-f"),
];

/// The partition of `region`, as in ARNs. The STS of one partition knows no roles of another.
#[must_use]
pub fn partition(region: &str) -> &'static str {
    let found = BEGINNINGS.iter().find(|(beginning, _)| region.starts_with(beginning));
    found.map_or("aws", |(_, partition)| partition)
}

//! The list parameters of AssumeRole; `None` leaves the parameter out.

use aws_sdk_sts::types::{PolicyDescriptorType, Tag};

use kiam_core::role::{PolicyArn, RoleIdentity};

pub(super) fn tags(identity: &RoleIdentity) -> Option<Vec<Tag>> {
    let tag = |(key, value)| {
        Tag::builder().key(key).value(value).build().expect("a tag with key and value is complete")
    };
    (!identity.tags.is_empty()).then(|| identity.tags.iter().map(tag).collect())
}

/// The keys of transitive tags: all of them, as in EKS Pod Identity, so that a pod that assumes another role can neither
/// drop nor replace them.
/// <https://docs.aws.amazon.com/eks/latest/userguide/pod-id-abac.html>
pub(super) fn transitive(identity: &RoleIdentity) -> Option<Vec<String>> {
    let keys = || identity.tags.iter().map(|(key, _)| key.to_owned()).collect();
    (!identity.tags.is_empty()).then(keys)
}

pub(super) fn policies(identity: &RoleIdentity) -> Option<Vec<PolicyDescriptorType>> {
    let descriptor = |arn: &PolicyArn| PolicyDescriptorType::builder().arn(arn.as_ref()).build();
    (!identity.policies.is_empty()).then(|| identity.policies.iter().map(descriptor).collect())
}

//! Why a pod gets no role, in words for whoever has to mend it.

use super::{InvalidAllowedRoles, InvalidExpression};
use crate::{
    pods::TooLong,
    role::{
        AccountName, InvalidExternalId, InvalidPolicies, InvalidRole, InvalidTags, QuotedText,
        RoleArn,
    },
};

/// Why a pod gets no role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It asks for none.
    #[error(
        "the pod has no annotation iam.amazonaws.com/role, nor, with --credential-source=web-identity, its ServiceAccount eks.amazonaws.com/role-arn"
    )]
    NoRole,
    /// Its annotation names no role.
    #[error("annotation iam.amazonaws.com/role: {0}")]
    InvalidRole(InvalidRole),
    /// Its ServiceAccount's annotation is not the ARN of a role.
    #[error("ServiceAccount {account}: annotation eks.amazonaws.com/role-arn: {error}")]
    InvalidAccountRole {
        /// The ServiceAccount.
        account: AccountName,
        /// What is wrong.
        error: InvalidRole,
    },
    /// Its annotation is longer than any value that can be used.
    #[error("annotation {annotation}: {error}")]
    TooLong {
        /// The annotation.
        annotation: &'static str,
        /// How long it is, and may be.
        error: TooLong,
    },
    /// So is its ServiceAccount's.
    #[error("ServiceAccount {account}: annotation eks.amazonaws.com/role-arn: {error}")]
    AccountTooLong {
        /// The ServiceAccount.
        account: AccountName,
        /// How long the annotation is, and may be.
        error: TooLong,
    },
    /// The ServiceAccount is not known (yet), so what it asks for isn't either.
    #[error("ServiceAccount {0} is not known yet")]
    AccountUnknown(AccountName),
    /// Nothing can vouch for a static pod.
    #[error(
        "it is a static pod, which has no ServiceAccount, and --credential-source=web-identity needs one"
    )]
    StaticPod,
    /// STS takes no external id with a token.
    #[error(
        "annotation iam.amazonaws.com/external-id: STS takes none with --credential-source=web-identity; remove it, and let the role's trust policy name the ServiceAccount"
    )]
    ExternalIdUnused,
    /// It sets what pods of its namespace may not.
    #[error(
        "annotation {annotation}: pods of namespace {namespace} may not set it, as --annotation-overrides does not name the namespace"
    )]
    OverrideForbidden {
        /// The annotation.
        annotation: &'static str,
        /// The pod's namespace.
        namespace: QuotedText,
    },
    /// STS takes no such external id.
    #[error("annotation iam.amazonaws.com/external-id: {0}")]
    InvalidExternalId(InvalidExternalId),
    /// STS takes no such tags.
    #[error("--session-tags: {0}")]
    InvalidTags(InvalidTags),
    /// It names no policies.
    #[error("annotation iam.amazonaws.com/session-policies: {0}")]
    InvalidPolicies(InvalidPolicies),
    /// A session may do what any of its policies allows, so that one more would loosen what the agent sets.
    #[error(
        "annotation iam.amazonaws.com/session-policies: pods may not set it, as --session-policy bounds all sessions, and one more policy would add to what those allow"
    )]
    PoliciesBound,
    /// The namespace is not known (yet), so what it permits isn't either.
    #[error("namespace {0} is not known yet")]
    NamespaceUnknown(QuotedText),
    /// The namespace says nothing, and must.
    #[error(
        "namespace {0} has neither annotation iam.amazonaws.com/permitted nor iam.amazonaws.com/allowed-roles, and --namespace-policy=required asks for one"
    )]
    NamespaceSilent(QuotedText),
    /// The namespace's expression can't be used.
    #[error("namespace {namespace}: annotation iam.amazonaws.com/permitted: {error}")]
    NamespaceInvalid {
        /// Its name.
        namespace: QuotedText,
        /// What is wrong.
        error: InvalidExpression,
    },
    /// The namespace permits other roles.
    #[error("namespace {namespace} permits {permitted}, which {role} does not match as a whole")]
    NamespaceForbids {
        /// Its name.
        namespace: QuotedText,
        /// Its expression.
        permitted: QuotedText,
        /// What the pod asked for.
        role: RoleArn,
    },
    /// The namespace's list can't be used.
    #[error("namespace {namespace}: annotation iam.amazonaws.com/allowed-roles: {error}")]
    NamespaceListInvalid {
        /// Its name.
        namespace: QuotedText,
        /// What is wrong.
        error: InvalidAllowedRoles,
    },
    /// The namespace's list has other roles.
    #[error("namespace {namespace} allows the roles {allowed}, none of which matches {role}")]
    NamespaceDisallows {
        /// Its name.
        namespace: QuotedText,
        /// Its list.
        allowed: QuotedText,
        /// What the pod asked for.
        role: RoleArn,
    },
}

// === impl Refusal ===

impl Refusal {
    /// Whether it is for want of a record, which may be on its way.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::NamespaceUnknown(_) | Self::AccountUnknown(_))
    }
}

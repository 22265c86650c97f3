//! Why a pod gets no role, with messages for the person who has to fix it.

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
    /// The pod names no role; nor, with web identity, does this ServiceAccount of the pod's.
    #[error("the pod has no annotation iam.amazonaws.com/role{}", nor_account(.0.as_ref()))]
    NoRole(Option<AccountName>),
    /// The pod's annotation is not a role.
    #[error("annotation iam.amazonaws.com/role: {0}")]
    InvalidRole(InvalidRole),
    /// The ServiceAccount's annotation is not the ARN of a role.
    #[error("ServiceAccount {account}: annotation eks.amazonaws.com/role-arn: {error}")]
    InvalidAccountRole {
        /// The ServiceAccount.
        account: AccountName,
        /// What is wrong.
        error: InvalidRole,
    },
    /// The pod's annotation is longer than any valid value.
    #[error("annotation {annotation}: {error}")]
    TooLong {
        /// The annotation.
        annotation: &'static str,
        /// How long it is, and may be.
        error: TooLong,
    },
    /// The ServiceAccount's annotation is longer than any valid value.
    #[error("ServiceAccount {account}: annotation eks.amazonaws.com/role-arn: {error}")]
    AccountTooLong {
        /// The ServiceAccount.
        account: AccountName,
        /// How long the annotation is, and may be.
        error: TooLong,
    },
    /// The ServiceAccount is not known (yet), nor is its role.
    #[error("ServiceAccount {0} is not known yet")]
    AccountUnknown(AccountName),
    /// A static pod has no token.
    #[error("a static pod has no ServiceAccount, which --credential-source=web-identity needs")]
    StaticPod,
    /// STS accepts no external id with a token.
    #[error(
        "annotation iam.amazonaws.com/external-id: STS accepts none with --credential-source=web-identity; remove it, and let the role's trust policy name the ServiceAccount"
    )]
    ExternalIdUnused,
    /// The pod sets an annotation that pods of its namespace may not set.
    #[error(
        "annotation {annotation}: pods of namespace {namespace} may not set it, because --annotation-overrides does not list the namespace"
    )]
    OverrideForbidden {
        /// The annotation.
        annotation: &'static str,
        /// The pod's namespace.
        namespace: QuotedText,
    },
    /// STS does not accept the external id.
    #[error("annotation iam.amazonaws.com/external-id: {0}")]
    InvalidExternalId(InvalidExternalId),
    /// STS does not accept the tags.
    #[error("--session-tags: {0}")]
    InvalidTags(InvalidTags),
    /// The pod's annotation is not a list of policies.
    #[error("annotation iam.amazonaws.com/session-policies: {0}")]
    InvalidPolicies(InvalidPolicies),
    /// A session may do what any of its policies allows, so that another policy would loosen the agent's.
    #[error(
        "annotation iam.amazonaws.com/session-policies: pods may not set it, because --session-policy limits all sessions, and another policy would allow more"
    )]
    PoliciesBound,
    /// The namespace is not known (yet), nor are the roles that it permits.
    #[error("namespace {0} is not known yet")]
    NamespaceUnknown(QuotedText),
    /// The namespace has no annotation, and needs one.
    #[error(
        "namespace {0} has neither annotation iam.amazonaws.com/permitted nor iam.amazonaws.com/allowed-roles, and --namespace-policy=required needs one"
    )]
    NamespaceSilent(QuotedText),
    /// The namespace's expression is invalid.
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
    /// The namespace's list is invalid.
    #[error("namespace {namespace}: annotation iam.amazonaws.com/allowed-roles: {error}")]
    NamespaceListInvalid {
        /// Its name.
        namespace: QuotedText,
        /// What is wrong.
        error: InvalidAllowedRoles,
    },
    /// The namespace's list allows other roles.
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

fn nor_account(account: Option<&AccountName>) -> String {
    let nor =
        |account| format!(", nor has its ServiceAccount {account} eks.amazonaws.com/role-arn");
    account.map(nor).unwrap_or_default()
}

// === impl Refusal ===

impl Refusal {
    /// Whether a record is missing that may still arrive.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::NamespaceUnknown(_) | Self::AccountUnknown(_))
    }
}

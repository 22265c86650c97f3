//! The names of annotations.

/// The role of a pod.
pub const ROLE: &str = "iam.amazonaws.com/role";
/// The session name of a pod.
pub const SESSION_NAME: &str = "iam.amazonaws.com/session-name";
/// The external ID of a pod.
pub const EXTERNAL_ID: &str = "iam.amazonaws.com/external-id";
/// The session policies of a pod.
pub const SESSION_POLICIES: &str = "iam.amazonaws.com/session-policies";
/// The roles of a namespace, as a regular expression.
pub const PERMITTED: &str = "iam.amazonaws.com/permitted";
/// The roles of a namespace, as a list of patterns.
pub const ALLOWED_ROLES: &str = "iam.amazonaws.com/allowed-roles";
/// Whether the pods of a namespace need session tokens.
pub const IMDSV2: &str = "iam.amazonaws.com/imdsv2";
/// The role of a ServiceAccount, as with EKS.
pub const ROLE_ARN: &str = "eks.amazonaws.com/role-arn";

//! Names a role the way AWS and kiam do.

use std::{collections::BTreeSet, fmt, sync::Arc, time::Duration};

/// A complete, well-formed ARN of an IAM role, such as `arn:aws:iam::123456789012:role/team/reader`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleArn(Arc<str>);

/// `RoleSessionName` as STS takes it: 2 to 64 of `[\w+=,.@-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionName(Arc<str>);

/// Everything that is sent to STS for one role: the key of the credential cache.
///
/// Two pods share credentials only when all of it is equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleIdentity {
    /// The role to assume.
    pub role: RoleArn,
    /// The session name, which CloudTrail shows.
    pub session_name: SessionName,
    /// The external id that the role's trust policy may ask for.
    pub external_id: Option<ExternalId>,
    /// How long the session is asked to last.
    pub duration: Duration,
}

/// `ExternalId` as STS takes it: 2 to 1,224 of `[\w+=,.@:/-]`. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExternalId(Arc<str>);

/// The identities that the node's pods are allowed and want, level-triggered.
pub type WantedRoles = Arc<BTreeSet<RoleIdentity>>;

// === impl ExternalId ===

impl fmt::Debug for ExternalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ExternalId(…)")
    }
}

//! One call of AssumeRole, and the check of its answer.

use std::time::{Duration, SystemTime};

use aws_sdk_sts::{Client, types::Credentials as StsCredentials};

use super::{
    error::{Failure, failure, retryable},
    parameters,
};
use kiam_core::{
    clock::Clock,
    credentials::{Credentials, SourceError},
    role::{QuotedText, RoleArn, RoleIdentity},
    secret::Secret,
};

/// A client that calls AssumeRole, with the node's credentials or those of a role in between.
pub(super) struct StsClient {
    pub(super) client: Client,
    pub(super) clock: Clock,
    /// The role of the client's credentials, if they are not the node's.
    pub(super) through: Option<RoleArn>,
}

// === impl StsClient ===

impl StsClient {
    /// Requests a session of `identity` for `duration`, instead of the identity's own duration.
    pub(super) async fn ask(
        &self,
        identity: &RoleIdentity,
        duration: Duration,
    ) -> Result<Credentials, Failure> {
        let issued = self.clock.now();
        let answer = self
            .client
            .assume_role()
            .role_arn(identity.role.as_ref())
            .role_session_name(identity.session_name.as_ref())
            .set_external_id(identity.external_id.as_ref().map(|id| id.expose().to_owned()))
            .duration_seconds(seconds(duration))
            .set_source_identity(identity.source_identity.as_ref().map(ToString::to_string))
            .set_tags(parameters::tags(identity))
            .set_transitive_tag_keys(parameters::transitive(identity))
            .set_policy_arns(parameters::policies(identity))
            .send()
            .await
            .map_err(|error| failure(&error, self.through.as_ref()))?;
        let user = answer.assumed_role_user.as_ref().map(|user| user.arn());
        checked((user, answer.credentials), identity, (issued, duration)).map_err(Failure::Other)
    }
}

/// Checks that an answer, the session's ARN with credentials, is for `identity`'s role. `asked` is the time of the request
/// and the requested duration.
pub(super) fn checked(
    (user, credentials): (Option<&str>, Option<StsCredentials>),
    identity: &RoleIdentity,
    asked: (SystemTime, Duration),
) -> Result<Credentials, SourceError> {
    if let Some(other) = user.filter(|user| !is_session_of(user, identity)) {
        let other = QuotedText::new(other);
        return Err(retryable(&format!("STS returned a session of another role: {other}")));
    }
    let credentials = credentials.ok_or_else(|| retryable("STS returned no credentials"))?;
    converted(credentials, identity, asked)
}

/// The value of `DurationSeconds`.
pub(super) fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
}

/// Whether `user`, the ARN of the session, is of `identity`'s role:
/// `arn:aws:sts::<account>:assumed-role/<name>/<session>`, without the role's path.
/// <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html>
fn is_session_of(user: &str, identity: &RoleIdentity) -> bool {
    let mut fields = user.splitn(6, ':').skip(4);
    let (account, resource) = (fields.next(), fields.next().unwrap_or_default());
    let mut words = resource.split('/');
    account == Some(identity.role.account())
        && words.next() == Some("assumed-role")
        && words.next() == Some(identity.role.name())
}

fn converted(
    credentials: StsCredentials,
    identity: &RoleIdentity,
    (asked_at, duration): (SystemTime, Duration),
) -> Result<Credentials, SourceError> {
    let expires = SystemTime::try_from(credentials.expiration)
        .map_err(|error| retryable(&format!("STS returned an invalid expiration: {error}")))?;
    // No session lasts longer than requested, so if the node's clock is slow, the end shows the beginning.
    let began = expires.checked_sub(duration);
    let issued = began.map_or(asked_at, |began| began.max(asked_at));
    Ok(Credentials {
        role: identity.role.clone(),
        access_key_id: credentials.access_key_id,
        secret_access_key: Secret::new(credentials.secret_access_key),
        session_token: Secret::new(credentials.session_token),
        issued,
        expires,
    })
}

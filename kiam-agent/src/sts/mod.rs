//! Issues credentials through AWS STS and classes its errors. The only importer of the AWS SDK.

mod error;
mod node;
mod parameters;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use aws_config::{
    BehaviorVersion, Region, provider_config::ProviderConfig, retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_sts::{Client, config::SharedHttpClient, types::Credentials as StsCredentials};
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use futures::future::BoxFuture;

use self::error::retryable;
use crate::{
    clock::Clock,
    credentials::{CredentialSource, Credentials, SourceError},
    role::{Quoted, RoleIdentity},
    secret::Secret,
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// One call, whole. The prefetcher is the only one who tries again.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Where STS is and who asks it.
#[derive(Clone, Debug)]
pub struct Config {
    /// The region whose STS is asked: fewer hops and its own rate limit.
    pub region: String,
    /// Instead of the region's endpoint.
    pub endpoint: Option<String>,
    /// The real IMDS, which has the node's own credentials where the environment and profile have none.
    pub upstream: String,
}

/// The endpoint of the real IMDS is no URL.
#[derive(Debug, thiserror::Error)]
#[error("--upstream {url:?} can't be used for the node's credentials: {reason}")]
pub struct InvalidUpstream {
    url: String,
    reason: String,
}

/// `sts:AssumeRole` with the node's credentials.
pub struct AssumeRole {
    client: Client,
    clock: Clock,
}

// === impl AssumeRole ===

impl AssumeRole {
    /// A client for `config`. Nothing is asked yet.
    ///
    /// # Errors
    ///
    /// [`InvalidUpstream`].
    pub async fn new(config: &Config, clock: Clock) -> Result<Self, InvalidUpstream> {
        let region = Region::new(config.region.clone());
        let provider = ProviderConfig::default().with_region(Some(region)).with_http_client(http());
        let node = node::credentials(config, provider).await?;
        Ok(Self::with_node(config, clock, node).await)
    }

    async fn with_node(config: &Config, clock: Clock, node: SharedCredentialsProvider) -> Self {
        let deadlines = TimeoutConfig::builder()
            .connect_timeout(CONNECT_DEADLINE)
            .operation_timeout(CALL_DEADLINE)
            .build();
        let shared = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http())
            .region(Region::new(config.region.clone()))
            .credentials_provider(node)
            .retry_config(RetryConfig::disabled())
            .timeout_config(deadlines)
            .load()
            .await;
        let mut builder = aws_sdk_sts::config::Builder::from(&shared);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        Self { client: Client::from_conf(builder.build()), clock }
    }

    async fn assume(&self, identity: &RoleIdentity) -> Result<Credentials, SourceError> {
        let seconds = i32::try_from(identity.duration.as_secs()).unwrap_or(i32::MAX);
        let issued = self.clock.now();
        let answer = self
            .client
            .assume_role()
            .role_arn(identity.role.as_ref())
            .role_session_name(identity.session_name.as_ref())
            .set_external_id(identity.external_id.as_ref().map(|id| id.expose().to_owned()))
            .duration_seconds(seconds)
            .set_source_identity(identity.source_identity.as_ref().map(ToString::to_string))
            .set_tags(parameters::tags(identity))
            .set_transitive_tag_keys(parameters::transitive(identity))
            .set_policy_arns(parameters::policies(identity))
            .send()
            .await
            .map_err(|error| error::classed(&error))?;
        if let Some(user) = &answer.assumed_role_user
            && !is_session_of(user.arn(), identity)
        {
            let user = Quoted::new(user.arn());
            return Err(retryable(&format!("STS answered for another role: {user}")));
        }
        let credentials =
            answer.credentials.ok_or_else(|| retryable("STS answered without credentials"))?;
        converted(credentials, identity, issued)
    }
}

impl CredentialSource for AssumeRole {
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>> {
        Box::pin(self.assume(identity))
    }
}

impl fmt::Debug for AssumeRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AssumeRole")
    }
}

/// The HTTP client of both STS and the metadata service; it speaks `http://` too.
fn http() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
        .build_https()
}

/// Whether `user`, the ARN of the session that STS opened, is of `identity`'s role:
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
    issued: SystemTime,
) -> Result<Credentials, SourceError> {
    let expires = SystemTime::try_from(credentials.expiration).map_err(|error| {
        retryable(&format!("STS answered an expiration that is no time: {error}"))
    })?;
    Ok(Credentials {
        role: identity.role.clone(),
        access_key_id: credentials.access_key_id,
        secret_access_key: Secret::new(credentials.secret_access_key),
        session_token: Secret::new(credentials.session_token),
        issued,
        expires,
    })
}

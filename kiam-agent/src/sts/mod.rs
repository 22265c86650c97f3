//! Issues credentials through AWS STS and classes its errors. The only importer of the AWS SDK.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use aws_config::{
    BehaviorVersion, Region, SdkConfig, default_provider::credentials::DefaultCredentialsChain,
    imds, provider_config::ProviderConfig, retry::RetryConfig, timeout::TimeoutConfig,
};
use aws_sdk_sts::{
    Client,
    config::http::HttpResponse,
    error::{DisplayErrorContext, ProvideErrorMetadata as _, SdkError},
    operation::assume_role::AssumeRoleError,
    types::Credentials as StsCredentials,
};
use aws_smithy_http_client::tls::{self, rustls_provider::CryptoMode};
use futures::future::BoxFuture;

use crate::{
    clock::Clock,
    credentials::{CredentialSource, Credentials, ErrorClass, SourceError},
    role::RoleIdentity,
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
        let shared = shared(config).await?;
        let mut builder = aws_sdk_sts::config::Builder::from(&shared);
        if let Some(endpoint) = &config.endpoint {
            builder = builder.endpoint_url(endpoint);
        }
        Ok(Self { client: Client::from_conf(builder.build()), clock })
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
            .send()
            .await
            .map_err(|error| classed(&error))?;
        let credentials = answer.credentials.ok_or_else(|| SourceError {
            class: ErrorClass::Retryable,
            message: "STS answered without credentials".to_owned(),
        })?;
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

/// The SDK's part: where the node's credentials come from, deadlines, no retries of its own.
async fn shared(config: &Config) -> Result<SdkConfig, InvalidUpstream> {
    let http = aws_smithy_http_client::Builder::new()
        .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
        .build_https();
    let region = Region::new(config.region.clone());
    let provider =
        ProviderConfig::default().with_region(Some(region.clone())).with_http_client(http.clone());
    let imds = imds::Client::builder()
        .configure(&provider)
        .endpoint(&config.upstream)
        .map_err(|error| InvalidUpstream {
            url: config.upstream.clone(),
            reason: error.to_string(),
        })?
        .build();
    let node = DefaultCredentialsChain::builder()
        .configure(provider)
        .region(region.clone())
        .imds_client(imds)
        .build()
        .await;
    let deadlines = TimeoutConfig::builder()
        .connect_timeout(CONNECT_DEADLINE)
        .operation_timeout(CALL_DEADLINE)
        .build();
    Ok(aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .region(region)
        .credentials_provider(node)
        .retry_config(RetryConfig::disabled())
        .timeout_config(deadlines)
        .load()
        .await)
}

fn converted(
    credentials: StsCredentials,
    identity: &RoleIdentity,
    issued: SystemTime,
) -> Result<Credentials, SourceError> {
    let expires = SystemTime::try_from(credentials.expiration).map_err(|error| SourceError {
        class: ErrorClass::Retryable,
        message: format!("STS answered an expiration that is no time: {error}"),
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

/// What an error means for the next attempt. Codes: "Errors" of AssumeRole and "Common errors" in the STS
/// API reference.
fn classed(error: &SdkError<AssumeRoleError, HttpResponse>) -> SourceError {
    let SdkError::ServiceError(service) = error else {
        let message = format!("STS could not be asked: {}", DisplayErrorContext(error));
        return SourceError { class: ErrorClass::Retryable, message: one_line(&message) };
    };
    let code = service.err().code().unwrap_or("no error code");
    let text = service.err().message().unwrap_or("no message");
    let status = service.raw().status().as_u16();
    let class = match code {
        "Throttling"
        | "ThrottlingException"
        | "RequestLimitExceeded"
        | "TooManyRequestsException" => ErrorClass::Throttled,
        // The node's own credentials; the chain gets new ones.
        "ExpiredToken" | "ExpiredTokenException" | "RequestExpired" => ErrorClass::Retryable,
        _ if status == 429 => ErrorClass::Throttled,
        _ if status >= 500 => ErrorClass::Retryable,
        _ => ErrorClass::Denied,
    };
    let hint = if code == "ValidationError" && text.contains("MaxSessionDuration") {
        "; shorten --session-duration or raise the role's maximum"
    } else {
        ""
    };
    SourceError { class, message: one_line(&format!("STS: {code}: {text}{hint}")) }
}

/// Errors end in logs and headers: no line ends, no more than a line's length.
fn one_line(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(500).collect()
}

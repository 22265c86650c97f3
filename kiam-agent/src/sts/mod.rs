//! Issues credentials through AWS STS and classes its errors. The only importer of the AWS SDK.

mod assume;
mod durations;
mod error;
mod hop;
mod http;
mod node;
mod parameters;
mod partition;
#[cfg(test)]
mod tests;
mod web_identity;

use std::{fmt, sync::Arc, time::Duration};

use aws_config::{
    BehaviorVersion, ConfigLoader, Region, provider_config::ProviderConfig, retry::RetryConfig,
    timeout::TimeoutConfig,
};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_sts::{Client, config::IdentityCache};
use futures::future::BoxFuture;

use self::{assume::StsClient, durations::Durations, hop::Hop};
pub use self::{durations::CHAINED, partition::partition, web_identity::WebIdentity};
use crate::proxy::Proxies;
use kiam_core::{
    clock::Clock,
    credentials::{CredentialSource, Credentials, PodTokens, SourceError},
    role::{Claimant, RoleIdentity},
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
    /// The role by way of which the others are assumed, if there is one.
    pub through: Option<RoleIdentity>,
    /// The real IMDS, which has the node's own credentials where the environment and profile have none.
    pub upstream: String,
    /// What STS is asked through; the real IMDS never is.
    pub proxies: Proxies,
}

/// The endpoint of the real IMDS is no URL.
#[derive(Debug, thiserror::Error)]
#[error("--upstream {url:?} can't be used for the node's credentials: {reason}")]
pub struct InvalidEndpoint {
    url: String,
    reason: String,
}

/// The source that asks the STS of `config`: for the pods' own `tokens`, or without them with the node's credentials.
///
/// # Errors
///
/// [`InvalidEndpoint`].
pub async fn source(
    config: &Config,
    clock: Clock,
    tokens: Option<Arc<dyn PodTokens>>,
) -> Result<Arc<dyn CredentialSource>, InvalidEndpoint> {
    Ok(match tokens {
        None => Arc::new(AssumeRole::new(config, clock).await?),
        Some(tokens) => Arc::new(WebIdentity::new(config, clock, tokens).await),
    })
}

/// `sts:AssumeRole` with the node's credentials, or with those of a role that these assume first.
pub struct AssumeRole {
    client: StsClient,
    durations: Durations,
}

// === impl AssumeRole ===

impl AssumeRole {
    /// A client for `config`. Nothing is asked yet.
    ///
    /// # Errors
    ///
    /// [`InvalidEndpoint`].
    pub async fn new(config: &Config, clock: Clock) -> Result<Self, InvalidEndpoint> {
        let region = Region::new(config.region.clone());
        let provider = ProviderConfig::default()
            .with_region(Some(region))
            .with_http_client(http::through(&config.proxies));
        let node = node::credentials(config, provider).await?;
        Ok(Self::with_node(config, clock, node).await)
    }

    async fn with_node(config: &Config, clock: Clock, node: SharedCredentialsProvider) -> Self {
        let loader = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http::through(&config.proxies));
        let settings = settings(config, loader.credentials_provider(node)).await;
        let client = |settings, through| StsClient {
            client: Client::from_conf(settings),
            clock: clock.clone(),
            through,
        };
        let durations = Durations::default();
        let Some(identity) = config.through.clone() else {
            return Self { client: client(settings.build(), None), durations };
        };
        let role = identity.role.clone();
        let hop = Hop { client: client(settings.clone().build(), None), identity };
        // Of its own, and as long as the call to STS that it takes.
        let cache = IdentityCache::lazy().load_timeout(CALL_DEADLINE).build();
        let settings = settings.credentials_provider(hop).identity_cache(cache);
        Self { client: client(settings.build(), Some(role)), durations }
    }
}

impl CredentialSource for AssumeRole {
    fn issue<'a>(
        &'a self,
        identity: &'a RoleIdentity,
        _claimant: &'a Claimant,
    ) -> BoxFuture<'a, Result<Credentials, SourceError>> {
        Box::pin(self.durations.fit(identity, |duration| self.client.ask(identity, duration)))
    }
}

impl fmt::Debug for AssumeRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AssumeRole")
    }
}

/// What every call to STS goes by: `config`, and what the environment says of FIPS and dual-stack endpoints.
async fn settings(config: &Config, loader: ConfigLoader) -> aws_sdk_sts::config::Builder {
    let deadlines = TimeoutConfig::builder()
        .connect_timeout(CONNECT_DEADLINE)
        .operation_timeout(CALL_DEADLINE)
        .build();
    let shared = loader
        .region(Region::new(config.region.clone()))
        .retry_config(RetryConfig::disabled())
        .timeout_config(deadlines)
        .load()
        .await;
    let settings = aws_sdk_sts::config::Builder::from(&shared);
    match &config.endpoint {
        // The environment's wishes about endpoints are about AWS's own, and an error with any other.
        Some(endpoint) => settings.endpoint_url(endpoint).use_fips(false).use_dual_stack(false),
        None => settings,
    }
}

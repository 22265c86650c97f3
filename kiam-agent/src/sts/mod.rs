//! Issues credentials through AWS STS and classifies its errors. Only this module uses the AWS SDK.

mod assume;
mod caller;
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
pub use self::{
    caller::{CallerError, caller},
    durations::CHAINED,
    partition::partition,
    web_identity::WebIdentity,
};
use crate::proxy::Proxies;
use kiam_core::{
    clock::Clock,
    credentials::{CredentialSource, Credentials, PodTokens, SourceError},
    role::{Claimant, RoleIdentity},
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// The deadline of one call. Only the prefetcher retries.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// The configuration of the STS clients.
#[derive(Clone, Debug)]
pub struct Config {
    /// The region whose STS is called, which has fewer hops and its own rate limit.
    pub region: String,
    /// An endpoint instead of the region's.
    pub endpoint: Option<String>,
    /// The role in between, by which the others are assumed, if there is one.
    pub through: Option<RoleIdentity>,
    /// The real IMDS, for the node's credentials if the environment and the profile have none.
    pub upstream: String,
    /// The proxies for STS. The real IMDS is never reached through a proxy.
    pub proxies: Proxies,
}

/// The endpoint of the real IMDS is not a URL.
#[derive(Debug, thiserror::Error)]
#[error("--upstream {url:?} can't be used for the node's credentials: {reason}")]
pub struct InvalidEndpoint {
    url: String,
    reason: String,
}

/// Why there can be no client for STS.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--upstream` is no endpoint.
    #[error(transparent)]
    Endpoint(#[from] InvalidEndpoint),
    /// STS is reached by TLS, and there is no CA certificate to verify it with.
    #[error(
        "no CA certificates were found to verify STS with ({searched}): install the package ca-certificates, or set SSL_CERT_FILE to the path of a CA bundle"
    )]
    Certificates {
        /// Where they were looked for, and why that failed.
        searched: &'static str,
    },
}

/// The source that asks the STS of `config`: for the pods' own `tokens`, or without them with the node's credentials.
///
/// # Errors
///
/// [`Error`].
pub async fn source(
    config: &Config,
    clock: Clock,
    tokens: Option<Arc<dyn PodTokens>>,
) -> Result<Arc<dyn CredentialSource>, Error> {
    ensure_certificates(config)?;
    Ok(match tokens {
        None => Arc::new(AssumeRole::new(config, clock).await?),
        Some(tokens) => Arc::new(WebIdentity::new(config, clock, tokens).await),
    })
}

/// Whether there is a CA certificate to verify the STS of `config` with, unless it is reached without TLS.
fn ensure_certificates(config: &Config) -> Result<(), Error> {
    let plain = config.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http:"));
    if plain {
        return Ok(());
    }
    http::ensure_certificates().map_err(|searched| Error::Certificates { searched })
}

/// A source of credentials by `sts:AssumeRole`, with the node's credentials or those of a role in between.
pub struct AssumeRole {
    client: StsClient,
    durations: Durations,
}

// === impl AssumeRole ===

impl AssumeRole {
    /// A source for `config`. No request is made yet.
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
        // A cache of its own, whose deadline is that of the call to STS.
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

/// The settings of all calls to STS: `config`, and the environment's FIPS and dual-stack settings.
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
        // The environment's settings are for AWS's own endpoints, and an error for any other.
        Some(endpoint) => settings.endpoint_url(endpoint).use_fips(false).use_dual_stack(false),
        None => settings,
    }
}

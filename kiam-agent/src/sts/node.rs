//! The node's own credentials, with which STS is called.

use std::time::Duration;

use aws_config::{
    Region, default_provider::credentials::DefaultCredentialsChain, imds,
    provider_config::ProviderConfig,
};
use aws_credential_types::{
    Credentials,
    provider::{ProvideCredentials, SharedCredentialsProvider, future},
};

use super::{Config, InvalidEndpoint, http};
use kiam_core::clock::Clock;

/// Credentials with less life than this are read again soon. IMDS always has longer ones, except when AWS fails to renew
/// them. Then the SDK would use expired credentials for ten to fifteen minutes at a time, which STS rejects.
const NEAR_THE_END: Duration = Duration::from_secs(16 * 60);
/// The time until the next read, less the five to ten seconds by which the SDK's cache is ahead of an expiry.
const SOON: Duration = Duration::from_secs(15);

/// The SDK's chain, with credentials near their end shortened so that they are read again soon.
#[derive(Debug)]
struct NodeCredentials {
    chain: DefaultCredentialsChain,
    clock: Clock,
}

/// The SDK's default chain (environment, profile, web identity, container, IMDS), with the real IMDS at `--upstream`.
pub(super) async fn credentials(
    config: &Config,
    provider: ProviderConfig,
) -> Result<SharedCredentialsProvider, InvalidEndpoint> {
    let imds = imds::Client::builder()
        // Never through a proxy: the answers are the node's own credentials.
        .configure(&provider.clone().with_http_client(http::direct()))
        .endpoint(&config.upstream)
        .map_err(|error| InvalidEndpoint {
            url: config.upstream.clone(),
            reason: error.to_string(),
        })?
        .build();
    // Without a region the chain looks for one, and asks 169.254.169.254 whatever `--upstream` says.
    let region = Region::new(config.region.clone());
    let chain = DefaultCredentialsChain::builder().configure(provider).region(region);
    let chain = chain.imds_client(imds);
    let chain = NodeCredentials { chain: chain.build().await, clock: Clock::system() };
    Ok(SharedCredentialsProvider::new(chain))
}

// === impl NodeCredentials ===

impl NodeCredentials {
    fn shortened(&self, mut credentials: Credentials) -> Credentials {
        let now = self.clock.now();
        if credentials.expiry().is_some_and(|expires| expires < now + NEAR_THE_END) {
            *credentials.expiry_mut() = credentials.expiry().min(Some(now + SOON));
        }
        credentials
    }
}

impl ProvideCredentials for NodeCredentials {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            self.chain.provide_credentials().await.map(|credentials| self.shortened(credentials))
        })
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        self.chain.fallback_on_interrupt().map(|credentials| self.shortened(credentials))
    }
}

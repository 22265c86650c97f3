//! The node's own credentials, with which STS is asked.

use aws_config::{
    default_provider::credentials::DefaultCredentialsChain, imds, provider_config::ProviderConfig,
};
use aws_credential_types::provider::SharedCredentialsProvider;

use super::{Config, InvalidUpstream};

/// The SDK's default chain (environment, profile, web identity, container, IMDS), with the real IMDS
/// where `--upstream` says it is.
pub(super) async fn credentials(
    config: &Config,
    provider: ProviderConfig,
) -> Result<SharedCredentialsProvider, InvalidUpstream> {
    let imds = imds::Client::builder()
        .configure(&provider)
        .endpoint(&config.upstream)
        .map_err(|error| InvalidUpstream {
            url: config.upstream.clone(),
            reason: error.to_string(),
        })?
        .build();
    let chain = DefaultCredentialsChain::builder().configure(provider).imds_client(imds);
    Ok(SharedCredentialsProvider::new(chain.build().await))
}

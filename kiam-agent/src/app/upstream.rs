//! Asks the node's own metadata service for what the flags leave out.

use std::time::Duration;

use tracing::{info, warn};

use super::error::Error;
use crate::{
    config::{Base, Config},
    imds, sts,
};
use kiam_core::{
    policy,
    role::{BaseArn, RoleResolver},
};

/// How long the start goes on asking the real IMDS for what it must know.
const UPSTREAM_ATTEMPTS: u32 = 30;

pub(super) async fn policy_config(
    config: &Config,
    upstream: &imds::Upstream,
    region: &str,
) -> Result<policy::Config, Error> {
    let base = match &config.roles.base {
        Base::Given(base) => Some(base.clone()),
        Base::Autodetect => Some(ask(|| upstream.base_arn()).await.map_err(Error::BaseArn)?),
        Base::Absent => None,
    };
    report_base(base.as_ref(), region);
    Ok(policy_with(config, base))
}

fn report_base(base: Option<&BaseArn>, region: &str) {
    if let Some(base) = base {
        info!(base_arn = %base, "Short role names are completed");
        if base.partition() != sts::partition(region) {
            warn!(base_arn = %base, region, "Short role names are of another partition than the region, whose STS does not know them");
        }
    }
}

/// The policy's configuration, with `base` completing short role names.
pub(super) fn policy_with(config: &Config, base: Option<BaseArn>) -> policy::Config {
    policy::Config {
        resolver: RoleResolver::new(base),
        source: config.sts.source,
        ..config.roles.policy.clone()
    }
}

pub(super) async fn region(config: &Config, upstream: &imds::Upstream) -> Result<String, Error> {
    match &config.sts.region {
        Some(region) => Ok(region.clone()),
        None => ask(|| upstream.region())
            .await
            .map_err(|error| Error::Region { upstream: config.upstream.to_string(), error }),
    }
}

/// Where STS is, and how it is asked.
pub(super) fn sts_config(config: &Config, region: String) -> sts::Config {
    sts::Config {
        region,
        endpoint: config.sts.endpoint.clone(),
        through: config.sts.through.clone(),
        upstream: config.upstream.to_string(),
        proxies: config.cluster.proxies.clone(),
    }
}

/// Asks the real IMDS again for a while: early after boot it may not answer yet.
async fn ask<T, F>(question: impl Fn() -> F) -> Result<T, imds::UpstreamError>
where
    F: Future<Output = Result<T, imds::UpstreamError>>,
{
    let mut attempt = 1;
    loop {
        match question().await {
            Err(error) if attempt < UPSTREAM_ATTEMPTS => {
                if attempt == 1 {
                    warn!(%error, "The real metadata service does not answer; asking again");
                }
                attempt += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            answer => return answer,
        }
    }
}

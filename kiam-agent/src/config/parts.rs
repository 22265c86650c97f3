//! The configurations of parts that several flags decide, or that lack what the node's metadata service knows.

use tracing::{info, warn};

use super::{Base, Config, version};
use crate::{admin::StatusSettings, older_pods::Entitlement, sts};
use kiam_core::{
    pods::NodePods,
    policy,
    role::{BaseArn, RoleResolver},
};
use kiam_kernel::{
    intercept::{self, HostNetworkPods, ListenerPath},
    sandboxes,
};
use kiam_requests::{
    imds::{Upstream, UpstreamError},
    serve,
};

/// Pods of a large node; EKS's default is 110, and 250 with prefix delegation.
const PODS: usize = 250;

/// The node's metadata service does not report what the flags leave open.
#[derive(Debug, thiserror::Error)]
pub enum Unreported {
    /// The region.
    #[error("the region is not known: set --region, as {0} does not report it: {1}")]
    Region(String, UpstreamError),
    /// The base ARN.
    #[error(
        "the base ARN is not known: set --role-base-arn, as the node's profile does not report it: {0}"
    )]
    BaseArn(UpstreamError),
}

// === impl Config ===

impl Config {
    /// Whether pods' traffic is only observed.
    #[must_use]
    pub fn observes(&self) -> bool {
        let mode = self.intercept.as_ref().map(|intercept| intercept.mode);
        mode == Some(intercept::Mode::Observe)
    }

    /// The region of STS.
    ///
    /// # Errors
    ///
    /// [`Unreported::Region`].
    pub async fn region(&self, upstream: &Upstream) -> Result<String, Unreported> {
        let failed = |error| Unreported::Region(self.upstream.to_string(), error);
        match &self.sts.region {
            Some(region) => Ok(region.clone()),
            None => upstream.region_at_start().await.map_err(failed),
        }
    }

    /// What completes short role names, if anything does. Logged.
    ///
    /// # Errors
    ///
    /// [`Unreported::BaseArn`].
    pub async fn base_arn(
        &self,
        upstream: &Upstream,
        region: &str,
    ) -> Result<Option<BaseArn>, Unreported> {
        let base = match &self.roles.base {
            Base::Given(base) => base.clone(),
            Base::Autodetect => upstream.base_arn_at_start().await.map_err(Unreported::BaseArn)?,
            Base::Absent => return Ok(None),
        };
        info!(base_arn = %base, "Short role names are completed");
        if base.partition() != sts::partition(region) {
            warn!(base_arn = %base, region, "Short role names are of another partition than the region, whose STS does not know them");
        }
        Ok(Some(base))
    }

    /// The policy's configuration, with `base` completing short role names.
    #[must_use]
    pub fn policy(&self, base: Option<BaseArn>) -> policy::Config {
        policy::Config {
            resolver: RoleResolver::new(base),
            source: self.sts.source,
            ..self.roles.policy.clone()
        }
    }

    /// Where STS of `region` is, and how it is asked.
    #[must_use]
    pub fn sts(&self, region: String) -> sts::Config {
        sts::Config {
            region,
            endpoint: self.sts.endpoint.clone(),
            through: self.sts.through.clone(),
            upstream: self.upstream.to_string(),
            proxies: self.cluster.proxies.clone(),
        }
    }

    /// Which pods are this node's: with `--node-name` all that are watched, otherwise those of `--host`.
    #[must_use]
    pub fn node_pods(&self) -> NodePods {
        match self.cluster.node_name {
            Some(_) => NodePods::Watched,
            None => NodePods::OfAddresses(self.hosts.v4, self.hosts.v6),
        }
    }

    /// The pods that get the node's credentials.
    #[must_use]
    pub fn entitlement(&self) -> Entitlement {
        let passes = |it: &intercept::Config| it.host_network == HostNetworkPods::Pass;
        Entitlement {
            passes_host_network: self.intercept.as_ref().is_some_and(passes),
            node_roles: self.imds.node_roles.clone(),
        }
    }

    /// What `kiam-agent status` shows of the flags.
    #[must_use]
    pub fn status(&self) -> StatusSettings {
        let (interception, path) = match &self.intercept {
            None => ("off", ListenerPath::Node.name()),
            Some(it) if self.observes() => ("observe", it.path.name()),
            Some(it) => ("enforce", it.path.name()),
        };
        StatusSettings {
            version: version(),
            node: self.cluster.node_name.clone(),
            interception,
            path: path.to_owned(),
            arguments: std::env::args().skip(1).collect(),
        }
    }

    /// Limits that leave open files to the listeners of as many pods as a node runs.
    #[must_use]
    pub fn serve(&self) -> serve::Config {
        let rate = self.pod_rate;
        let mut config =
            serve::Config { requests: rate, new_connections: rate, ..serve::Config::default() };
        if self.intercept.as_ref().is_some_and(intercept::Config::follows_sandboxes) {
            config.other_files += sandboxes::descriptors(PODS);
        }
        config
    }
}

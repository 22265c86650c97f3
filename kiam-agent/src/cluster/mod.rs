//! Keeps the [`PodIndex`] in sync with the Kubernetes API.
//!
//! Objects are reduced to [`kiam_core::pods`]' own types as soon as they are read. The one rule: no error of the API
//! server loses a record or ends the agent.

mod access;
mod backoff;
mod body;
mod client;
mod events;
mod eviction;
mod failure;
mod files;
mod filters;
mod freshness;
mod inventory;
mod kinds;
mod listing;
mod metrics;
mod operator;
mod outage;
mod reflector;
mod sieve;
mod startup_taint;
mod tls;
mod tokens;
mod wire;

use std::{path::PathBuf, sync::Arc, time::Duration};

pub use self::{
    access::{AccessError, Right, ServerRoute, ServerVersion},
    events::{Age, EventParts, Events, Exposed, Exposure},
    eviction::{EvictionParts, Evictions},
    inventory::{InventoryError, inventory},
    metrics::Metrics,
    operator::{
        CommandOutput, ContainerName, FailureKind, LogPart, OperatorClient, RequestFailure,
    },
    startup_taint::{InvalidTaintKey, StartupTaint, TaintKey},
};
use tracing::Instrument;

use self::{
    files::Origin,
    kinds::{Namespaces, Pods, ServiceAccounts},
    reflector::{Reflector, ReflectorParts, Timing},
    tls::Health,
    tokens::Tokens,
};
use crate::proxy::{InvalidProxy, Proxies};
use kiam_core::{
    credentials::PodTokens,
    lifecycle::{Drain, Latch, Readiness},
    pods::{PodIndex, PodReader},
    role::Source,
    telemetry::Chain,
};

/// The configuration of the cluster's client and its watches.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kubeconfig file; without one, the cluster that this process runs in.
    pub kubeconfig: Option<PathBuf>,
    /// The node whose pods are watched; without it, all pods.
    pub node_name: Option<String>,
    /// The time between two lists of pods, which repair what the watch lost; of other kinds at least an hour.
    pub sync_interval: Duration,
    /// The time without event or bookmark, jittered, after which the watch is replaced and a list is fetched.
    pub stall: Duration,
    /// The taint that is removed from this node once the agent is ready; it needs a node's name.
    pub startup_taint: Option<TaintKey>,
    /// Whether pods that may hold the node's credentials are evicted.
    pub evict_older_pods: bool,
    /// The time without a current answer of etcd, jittered, after which a list proves that etcd answers.
    pub prove_after: Duration,
    /// The proxies for the API server, unless the kubeconfig names one.
    pub proxies: Proxies,
}

/// Why there is no client. Retrying does not help.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is missing or is not a kubeconfig.
    #[error("can't use the kubeconfig {}: {source}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The error.
        source: Box<kube::config::KubeconfigError>,
    },
    /// This process does not run in a pod with a ServiceAccount.
    #[error("the pod has no configuration of its cluster; outside a pod, set --kubeconfig: {0}")]
    InCluster(#[source] kube::config::InClusterError),
    /// Certificates or keys are invalid.
    #[error("can't create a client for the Kubernetes API: {}", describe(.0))]
    Client(#[source] Box<kube::Error>),
    /// The kubeconfig names an invalid proxy.
    #[error("can't use the kubeconfig's {0}")]
    Proxy(#[from] InvalidProxy),
}

/// A cluster, not yet connected.
pub struct Cluster {
    client: kube::Client,
    config: Config,
    readiness: Readiness,
}

/// The latches that are set once the first list of each kind is taken. They stay set.
#[derive(Clone, Debug)]
pub struct SyncLatches {
    /// "pods synced".
    pub pods: Latch,
    /// "namespaces synced".
    pub namespaces: Latch,
    /// "service accounts synced"; absent if ServiceAccounts are not needed, and so not watched.
    pub service_accounts: Option<Latch>,
}

// === impl SyncLatches ===

impl SyncLatches {
    /// Latches of `readiness`. ServiceAccounts are needed only where they vouch for pods.
    #[must_use]
    pub fn new(readiness: &Readiness, source: Source) -> Self {
        Self {
            pods: readiness.latch("pods"),
            namespaces: readiness.latch("namespaces"),
            service_accounts: (source == Source::WebIdentity)
                .then(|| readiness.latch("service accounts")),
        }
    }

    /// The latches of all kinds that are watched.
    #[must_use]
    pub fn all(&self) -> Vec<Latch> {
        let both = [&self.pods, &self.namespaces].into_iter();
        both.chain(&self.service_accounts).cloned().collect()
    }
}

// === impl Cluster ===

impl Cluster {
    /// Reads the cluster's description. Sends nothing: the server may be down. While TLS fails for long, the agent is not
    /// ready.
    ///
    /// # Errors
    ///
    /// [`Error`] when the configuration can't be used.
    pub fn new(config: Config, readiness: &Readiness) -> Result<Self, Error> {
        let health = Health::new("TLS with the Kubernetes API", readiness);
        let origin = Origin::new(config.kubeconfig.as_deref());
        let client = client::connect(origin, &config.proxies, health)?;
        Ok(Self { client, config, readiness: readiness.clone() })
    }

    /// The task that writes Events about this node's pods. It is no error if the agent may not write them.
    #[must_use]
    pub fn events(&self, metrics: &Metrics) -> Events {
        let (client, node) = (self.client.clone(), self.config.node_name.clone());
        Events { client, node, metrics: metrics.clone() }
    }

    /// The task that evicts pods of this node, if that is configured.
    #[must_use]
    pub fn evictions(&self, metrics: &Metrics) -> Option<Evictions> {
        let evictions = || Evictions { client: self.client.clone(), metrics: metrics.clone() };
        self.config.evict_older_pods.then(evictions)
    }

    /// The task that removes the startup taint from this node, if one is configured.
    #[must_use]
    pub fn startup_taint(&self) -> Option<StartupTaint> {
        let (node, key) = (self.config.node_name.clone()?, self.config.startup_taint.clone()?);
        Some(StartupTaint { client: self.client.clone(), node, key })
    }

    /// The source of tokens for the pods of `reader`, if those are what STS is shown; with the kubeconfig file `identity`, or
    /// without one with this client. Sends nothing.
    ///
    /// # Errors
    ///
    /// [`Error`] when the file can't be used.
    pub fn tokens(
        &self,
        source: Source,
        identity: Option<PathBuf>,
        reader: PodReader,
        metrics: Metrics,
    ) -> Result<Option<Arc<dyn PodTokens>>, Error> {
        if source == Source::Node {
            return Ok(None);
        }
        let client = match identity {
            None => self.client.clone(),
            Some(path) => {
                let health =
                    Health::new("TLS with the Kubernetes API, for tokens", &self.readiness);
                client::connect(Origin::Kubeconfig(path), &self.config.proxies, health)?
            }
        };
        Ok(Some(Arc::new(Tokens { client, reader, metrics })))
    }

    /// Copies pods and namespaces, and ServiceAccounts if they are needed, into `index` until the drain begins. `reader` is
    /// a reader of the same index.
    pub async fn run(
        self,
        index: PodIndex,
        reader: PodReader,
        synced: SyncLatches,
        metrics: Metrics,
        mut drain: Drain,
    ) {
        let Config { node_name: node, sync_interval, stall, prove_after, .. } = self.config;
        let timing = Timing { sync_interval, stall, prove_after };
        metrics.read(&reader);
        let (index, reader) = (&index, &reader);
        let pods = Pods { index, reader, node };
        let connection = ReflectorParts { client: self.client, metrics, readiness: self.readiness };
        let pods = Reflector::new(&connection, pods, timing, synced.pods);
        let namespaces = Namespaces(index);
        let namespaces = Reflector::new(&connection, namespaces, timing, synced.namespaces);
        let accounts = synced.service_accounts.map(|synced| {
            let kind = ServiceAccounts(index);
            Reflector::new(&connection, kind, timing, synced)
        });
        let accounts = async {
            if let Some(accounts) = &accounts {
                accounts.run().await;
            }
        };
        let all = async { tokio::join!(pods.run(), namespaces.run(), accounts) };
        tokio::select! {
            () = drain.started() => {}
            _ = all.instrument(tracing::info_span!("cluster")) => {}
        }
    }
}

/// The text of an error in one line, without the answer's body, which may hold secrets.
fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            format!("the server answers {} {}: {}", status.code, status.reason, status.message)
        }
        error => match tls::remedy(error) {
            Some(remedy) => format!("{} ({remedy})", Chain(error)),
            None => Chain(error).to_string(),
        },
    }
}

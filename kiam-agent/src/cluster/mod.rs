//! Speaks Kubernetes: keeps the [`PodIndex`] the same as the API server has it.
//!
//! Objects are reduced to [`kiam_core::pods`]' own types as soon as they are read. The one rule: trouble
//! with the API server loses nothing that is known, and is never the end.

mod backoff;
mod body;
mod client;
mod events;
mod eviction;
mod failure;
mod files;
mod freshness;
mod kinds;
mod listing;
mod metrics;
mod outage;
mod reflector;
mod sieve;
mod startup_taint;
mod tls;
mod tokens;
mod wire;

use std::{path::PathBuf, time::Duration};

pub use self::{
    events::{EventParts, Events, Exposure},
    eviction::{EvictionParts, Evictions},
    metrics::Metrics,
    startup_taint::{InvalidTaintKey, StartupTaint, TaintKey},
    tokens::Tokens,
};
use tracing::Instrument;

use self::{
    files::Origin,
    kinds::{Namespaces, Pods, ServiceAccounts},
    reflector::{Reflector, ReflectorParts, Timing},
    tls::Health,
};
use crate::proxy::{InvalidProxy, Proxies};
use kiam_core::{
    lifecycle::{Drain, Latch, Readiness},
    pods::{PodIndex, PodReader},
    telemetry::Chain,
};

/// How to reach the cluster and what to watch there.
#[derive(Debug, Clone)]
pub struct Config {
    /// A kubeconfig file; without one, the cluster that this process runs in.
    pub kubeconfig: Option<PathBuf>,
    /// Only this node's pods; without it, all.
    pub node_name: Option<String>,
    /// Time between two lists of pods, which heal whatever the watch lost; of other kinds at least an hour.
    pub sync_interval: Duration,
    /// After so long, up to a tenth more or less, without event or bookmark: a list, and another watch.
    pub stall: Duration,
    /// Taken off this node once the agent is ready; nothing is without a node's name.
    pub startup_taint: Option<TaintKey>,
    /// Whether pods that may hold the node's credentials are evicted.
    pub evict_older_pods: bool,
    /// After so long, up to a tenth more or less, without news of pods that etcd itself has just told: a list that is
    /// such news.
    pub prove_after: Duration,
    /// What the API server is asked through, unless the kubeconfig names a proxy of its own.
    pub proxies: Proxies,
}

/// Why there can be no client; trying again will not help.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not there or is no kubeconfig.
    #[error("can't use the kubeconfig {}: {source}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<kube::config::KubeconfigError>,
    },
    /// This process does not run in a pod with a service account.
    #[error("can't use the cluster's own configuration, give --kubeconfig outside a pod: {0}")]
    InCluster(#[source] kube::config::InClusterError),
    /// Certificates or keys that can't be used.
    #[error("can't make a client for the Kubernetes API: {}", describe(.0))]
    Client(#[source] Box<kube::Error>),
    /// The kubeconfig names a proxy that is none.
    #[error("can't use the kubeconfig's {0}")]
    Proxy(#[from] InvalidProxy),
}

/// A client of one cluster, not yet connected.
pub struct Cluster {
    client: kube::Client,
    config: Config,
    readiness: Readiness,
}

/// What is set once the first list of each kind is taken. Stays set: what is known stays good.
#[derive(Clone, Debug)]
pub struct SyncLatches {
    /// "pods synced".
    pub pods: Latch,
    /// "namespaces synced".
    pub namespaces: Latch,
    /// "service accounts synced"; absent where they are not needed, and so not asked for.
    pub service_accounts: Option<Latch>,
}

// === impl Cluster ===

impl Cluster {
    /// Reads what there is to read about the cluster. Sends nothing: the server may be down. While TLS with it fails for
    /// long, `readiness` says so.
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

    /// What tells of this node's pods by Events; a ServiceAccount that may not write them is no error.
    #[must_use]
    pub fn events(&self, metrics: &Metrics) -> Events {
        let (client, node) = (self.client.clone(), self.config.node_name.clone());
        Events { client, node, metrics: metrics.clone() }
    }

    /// What evicts pods of this node, if that is asked for.
    #[must_use]
    pub fn evictions(&self, metrics: &Metrics) -> Option<Evictions> {
        let evictions = || Evictions { client: self.client.clone(), metrics: metrics.clone() };
        self.config.evict_older_pods.then(evictions)
    }

    /// What takes the startup taint off this node, if that is asked for.
    #[must_use]
    pub fn startup_taint(&self) -> Option<StartupTaint> {
        let (node, key) = (self.config.node_name.clone()?, self.config.startup_taint.clone()?);
        Some(StartupTaint { client: self.client.clone(), node, key })
    }

    /// Who asks this cluster for tokens of the pods that `reader` knows: as the kubeconfig file `identity` says, else as
    /// this client. Sends nothing.
    ///
    /// # Errors
    ///
    /// [`Error`] when the file can't be used.
    pub fn tokens(
        &self,
        identity: Option<PathBuf>,
        reader: PodReader,
        metrics: Metrics,
    ) -> Result<Tokens, Error> {
        let client = match identity {
            None => self.client.clone(),
            Some(path) => {
                let health =
                    Health::new("TLS with the Kubernetes API, for tokens", &self.readiness);
                client::connect(Origin::Kubeconfig(path), &self.config.proxies, health)?
            }
        };
        Ok(Tokens { client, reader, metrics })
    }

    /// Copies pods and namespaces, and ServiceAccounts if they are needed, into `index`
    /// until the drain begins. `reader` reads that same index.
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

/// An error as one line: without the secrets that a whole answer may hold.
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

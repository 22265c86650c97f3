//! Speaks Kubernetes: watches in. The only importer of kube.
//!
//! Two feeds, of pods and of namespaces, each a list and then a watch that is opened anew whenever it ends,
//! errs or falls silent. Nothing here gives up: what is held stays held while the API server is away.

mod convert;
mod feed;
mod metrics;
mod resources;

use std::{path::PathBuf, time::Duration};

use kube::{
    Client,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

pub use self::metrics::Metrics;
use self::{
    feed::Feed,
    resources::{Namespaces, Pods},
};
use crate::{
    lifecycle::{Drain, Latch},
    pods::{PodIndex, PodReader},
};

/// How the API server is reached and what is asked of it.
#[derive(Clone, Debug)]
pub struct Config {
    /// A kubeconfig file; `None`: the pod's own service account. Never `~/.kube`.
    pub kubeconfig: Option<PathBuf>,
    /// Watch only the pods of this node; `None`: all pods.
    pub node_name: Option<String>,
    /// Everything is listed anew this often, in case an event was lost.
    pub sync_interval: Duration,
    /// A watch that shows neither event nor bookmark (about one a minute) for this long is opened anew.
    pub stall: Duration,
}

/// The API server can't be asked, and no waiting helps.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is missing or is no kubeconfig.
    #[error("--kubeconfig {path:?}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// kube's error.
        #[source]
        source: KubeconfigError,
    },
    /// The agent does not run in a pod with a service account.
    #[error("not in a cluster ({0}): name a file with --kubeconfig")]
    InCluster(#[source] InClusterError),
    /// The configuration can't be used.
    #[error("Kubernetes client: {0}")]
    Client(#[from] kube::Error),
}

/// What is set once the first list of each kind is in.
#[derive(Clone, Debug)]
pub struct Synced {
    /// Pods.
    pub pods: Latch,
    /// Namespaces.
    pub namespaces: Latch,
}

/// The two feeds, ready to run.
pub struct Cluster {
    client: Client,
    config: Config,
}

// === impl Cluster ===

impl Cluster {
    /// Reads the configuration; the server is not asked yet.
    ///
    /// # Errors
    ///
    /// [`Error`], for a configuration that can't be used.
    pub async fn new(config: Config) -> Result<Self, Error> {
        let mut access = match &config.kubeconfig {
            Some(path) => {
                let failed = |source| Error::Kubeconfig { path: path.clone(), source };
                let file = Kubeconfig::read_from(path).map_err(failed)?;
                kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                    .await
                    .map_err(failed)?
            }
            None => kube::Config::incluster().map_err(Error::InCluster)?,
        };
        access.connect_timeout = Some(Duration::from_secs(5));
        Ok(Self { client: Client::try_from(access)?, config })
    }

    /// Feeds `index` until the drain begins.
    pub async fn run(
        self,
        index: PodIndex,
        reader: PodReader,
        synced: Synced,
        metrics: Metrics,
        mut drain: Drain,
    ) {
        let pods = Feed {
            resource: Pods::new(self.client.clone(), self.config.node_name.as_deref()),
            index: &index,
            synced: synced.pods,
            metrics: metrics.clone(),
            config: &self.config,
        };
        let namespaces = Feed {
            resource: Namespaces::new(self.client),
            index: &index,
            synced: synced.namespaces,
            metrics,
            config: &self.config,
        };
        tokio::select! {
            () = pods.run(|| reader.missed()) => {}
            () = namespaces.run(std::future::pending) => {}
            () = drain.started() => {}
        }
    }
}

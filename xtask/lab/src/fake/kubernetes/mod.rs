//! A Kubernetes API server of pods, namespaces, ServiceAccounts and their tokens, and Events: list, watch, bookmarks,
//! history that can be too old, and faults.

mod api;
mod containers;
mod record;
mod resource;
mod store;
#[cfg(test)]
mod tests;
mod watch;
mod write;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result};

use super::{
    fault::Faults,
    http::{Place, Server},
};

pub use containers::{Container, ExecProtocol};
pub use record::{NamespaceRecord, PodRecord, ServiceAccountRecord};
pub use resource::Resource;
pub use store::{Gone, Seen, Store};

/// The server. Derefs to its [`Store`], which says what is in it; the store outlives stop and start.
#[derive(Debug)]
pub struct Kubernetes {
    server: Server<api::Api>,
    store: Arc<Store>,
}

// === impl Kubernetes ===

impl Kubernetes {
    /// Starts it, empty.
    pub fn start(place: Place) -> Result<Self> {
        let store = Arc::new(Store::default());
        let server = Server::start(vec![place], Arc::new(api::Api::new(Arc::clone(&store))))?;
        Ok(Self { server, store })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn store(&self) -> Arc<Store> {
        Arc::clone(&self.store)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The faults of its answers. Of open watches see [`Store`].
    #[must_use]
    pub fn faults(&self) -> &Faults {
        self.server.faults()
    }

    /// Goes away: connections are cut, new ones refused.
    pub fn stop(&self) {
        self.server.stop();
    }

    /// Comes back on the same port with the same records.
    pub fn restart(&self) -> Result<()> {
        self.server.restart()
    }

    /// Writes a kubeconfig that names this server, over plain HTTP and without credentials.
    pub fn write_kubeconfig(&self, path: &Path) -> Result<()> {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
             clusters: [{{name: lab, cluster: {{server: \"http://{}\"}}}}]\n\
             users: [{{name: lab, user: {{}}}}]\n\
             contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n",
            self.address()
        );
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

impl std::ops::Deref for Kubernetes {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

/// How watches are; each holds until it is changed.
#[derive(Clone, Copy, Debug)]
struct Conduct {
    /// Open watches say nothing, not even bookmarks, and stay open.
    stalled: bool,
    /// How a watch from before the history is told so.
    gone: Gone,
    /// How often a quiet watch gets a bookmark.
    bookmarks: Duration,
}

impl Default for Conduct {
    fn default() -> Self {
        let bookmarks = Duration::from_secs(1);
        Self { stalled: false, gone: Gone::Event, bookmarks }
    }
}

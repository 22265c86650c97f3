//! The connection to the API server.

use std::{path::Path, time::Duration};

use kube::config::{KubeConfigOptions, Kubeconfig};

use super::Error;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const USER_AGENT: &str = concat!("kiam-agent/", env!("CARGO_PKG_VERSION"));

/// A client for the server that the kubeconfig file names, else for the cluster that this process
/// runs in. Files of the user's home are never looked at: an agent that was started with a flag missing
/// must fail, not watch some other cluster.
///
/// Nothing is sent yet, so it does not matter whether the server is up.
pub(super) async fn connect(kubeconfig: Option<&Path>) -> Result<kube::Client, Error> {
    let mut settings = match kubeconfig {
        Some(path) => {
            let unusable =
                |source| Error::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
            let file = Kubeconfig::read_from(path).map_err(unusable)?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(unusable)?
        }
        None => kube::Config::incluster().map_err(Error::InCluster)?,
    };
    settings.connect_timeout = Some(CONNECT_TIMEOUT);
    // A watch may rightly be silent for a minute; lists and watches have deadlines of their own.
    settings.read_timeout = None;
    // The loops that ask are the only ones that retry, with their own pauses.
    settings.default_retry = false;
    settings.headers.push((
        "user-agent".parse().expect("a header name in lower case is valid"),
        USER_AGENT.parse().expect("a name, a slash and a version are a valid header value"),
    ));
    kube::Client::try_from(settings).map_err(|source| Error::Client(Box::new(source)))
}

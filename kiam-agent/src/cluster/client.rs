//! The connection to the API server.
//!
//! Certificates, keys, tokens and the kubeconfig file itself are replaced while the agent runs: by the kubelet, and by
//! the renewal of a cluster's CA. The client of this module therefore builds a new one when a file has changed. Open
//! connections are left as they are.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper_timeout::TimeoutConnector;
use kube::client::{Body, ConfigExt as _};
use tokio::{task::spawn_blocking, time::Instant};
use tower::{BoxError, Service, ServiceBuilder};
use tracing::{info, warn};

use super::{
    Error,
    files::{Description, Digest, Origin},
    tls::Health,
};
use crate::{
    proxy::{Proxies, Proxy},
    transport::{self, Connector},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The shortest time between two checks for changed files.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
const USER_AGENT: &str = concat!("kiam-agent/", env!("CARGO_PKG_VERSION"));

/// A client that is rebuilt when a file of its [`Origin`] has changed.
#[derive(Clone)]
struct RenewingClient(Arc<Shared>);

struct Shared {
    origin: Origin,
    proxies: Proxies,
    health: Health,
    state: Mutex<State>,
}

struct State {
    client: kube::Client,
    digest: Digest,
    checked: Instant,
    /// Why rebuilding fails, as it was logged.
    problem: Option<String>,
}

/// A client for the server that `origin` describes.
///
/// Nothing is sent yet: the server may be down.
pub(super) fn connect(
    origin: Origin,
    proxies: &Proxies,
    health: Health,
) -> Result<kube::Client, Error> {
    let (client, digest) = build(&origin, proxies)?;
    let state = State { client, digest, checked: Instant::now(), problem: None };
    let (proxies, state) = (proxies.clone(), Mutex::new(state));
    let client = RenewingClient(Arc::new(Shared { origin, proxies, health, state }));
    // The default namespace does not matter: all paths are complete.
    Ok(kube::Client::new(client, "default"))
}

// === impl RenewingClient ===

impl Service<Request<Body>> for RenewingClient {
    type Response = Response<Body>;
    type Error = kube::Error;
    type Future = BoxFuture<'static, kube::Result<Response<Body>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<kube::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move {
            let answer = shared.client().await.send(request).await;
            shared.health.heard(&answer);
            answer
        })
    }
}

// === impl Shared ===

impl Shared {
    async fn client(self: &Arc<Self>) -> kube::Client {
        {
            let mut state = self.state();
            if state.checked.elapsed() < CHECK_INTERVAL {
                return state.client.clone();
            }
            // Other requests use the old client meanwhile.
            state.checked = Instant::now();
        }
        let shared = self.clone();
        // A panic there is a bug; the old client stays usable.
        let _ = spawn_blocking(move || shared.renew()).await;
        self.state().client.clone()
    }

    /// Builds a new client if a file has changed. While that fails, the old one is used: files may be missing for a moment,
    /// or not match yet.
    fn renew(&self) {
        let digest = self.state().digest.clone();
        if !self.origin.is_changed(&digest) {
            return;
        }
        match build(&self.origin, &self.proxies) {
            Ok((client, digest)) => {
                info!(origin = ?self.origin, "Reloaded the credentials for the Kubernetes API");
                let mut state = self.state();
                (state.client, state.digest, state.problem) = (client, digest, None);
            }
            Err(error) => {
                let problem = error.to_string();
                let mut state = self.state();
                if state.problem.as_ref() != Some(&problem) {
                    warn!(origin = ?self.origin, %error, "The changed credentials for the Kubernetes API are invalid; using the old ones");
                    state.problem = Some(problem);
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn build(origin: &Origin, proxies: &Proxies) -> Result<(kube::Client, Digest), Error> {
    let Description { mut config, proxy, digest } = origin.read(proxies)?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.headers.push((
        "user-agent".parse().expect("a header name in lower case is valid"),
        USER_AGENT.parse().expect("a name, a slash and a version are a valid header value"),
    ));
    if let Some(proxy) = &proxy {
        let (server, proxy) = (&config.cluster_url, proxy.address());
        info!(%server, %proxy, "Using a proxy for the Kubernetes API");
    }
    let client = proxied_client(proxy.as_ref(), &config);
    Ok((client.map_err(|source| Error::Client(Box::new(source)))?, digest))
}

/// A client of the server of `config`, through `proxy` if there is one.
fn proxied_client(proxy: Option<&Proxy>, config: &kube::Config) -> kube::Result<kube::Client> {
    let Some(proxy) = proxy else { return client(config, Connector::direct()) };
    if proxy.address().scheme_str() != Some("https") {
        return client(config, Connector::tunnel(proxy, transport::tcp()));
    }
    // As with kubectl, the cluster's CA signs the proxy's certificate, which is for the proxy's own name.
    let mut to_proxy = config.clone();
    to_proxy.tls_server_name = None;
    let to_proxy = to_proxy.rustls_https_connector_with_connector(transport::tcp())?;
    client(config, Connector::tunnel(proxy, to_proxy))
}

/// A client whose connections `connector` makes. It has no deadline for answers: a watch may be silent for a minute.
/// Callers retry with their own delays.
fn client(config: &kube::Config, connector: Connector) -> kube::Result<kube::Client> {
    let tls = config.rustls_https_connector_with_connector(connector)?;
    let mut timed = TimeoutConnector::new(tls);
    timed.set_connect_timeout(config.connect_timeout);
    timed.set_write_timeout(config.write_timeout);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .map_request(|request: Request<Body>| {
            request.map(|body| body.map_err(BoxError::from).boxed_unsync())
        })
        .service(transport::client(timed));
    Ok(kube::Client::new(service, config.default_namespace.clone()))
}

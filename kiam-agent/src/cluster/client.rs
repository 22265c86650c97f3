//! The connection to the API server.
//!
//! Certificates, keys, tokens and the kubeconfig file itself are replaced while the agent runs: by the kubelet, and by
//! whoever renews a cluster's CA. So the client that the rest of the module has makes a new one whenever they have
//! changed. Connections that are open already stay as they are.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Request, Response, Uri};
use hyper::rt::{Read, Write};
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connection, HttpConnector, proxy::Tunnel},
    },
    rt::TokioExecutor,
};
use kube::client::{Body, ConfigExt as _};
use tokio::{task::spawn_blocking, time::Instant};
use tower::{BoxError, Service, ServiceBuilder};
use tracing::{info, warn};

use super::{
    Error,
    files::{Description, Digest, Origin},
    tls::Health,
};
use crate::proxy::{Proxies, Proxy};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often requests see whether files have changed.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
const USER_AGENT: &str = concat!("kiam-agent/", env!("CARGO_PKG_VERSION"));

/// A client that stays as the files of its [`Origin`] say.
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
    looked: Instant,
    /// Why there is no newer one, once that is logged.
    problem: Option<String>,
}

/// A client for the server that `origin` describes.
///
/// Nothing is sent yet, so it does not matter whether the server is up.
pub(super) fn connect(
    origin: Origin,
    proxies: &Proxies,
    health: Health,
) -> Result<kube::Client, Error> {
    let (client, digest) = make(&origin, proxies)?;
    let state = State { client, digest, looked: Instant::now(), problem: None };
    let (proxies, state) = (proxies.clone(), Mutex::new(state));
    let client = RenewingClient(Arc::new(Shared { origin, proxies, health, state }));
    // Whose namespace it is does not matter: all paths are written out.
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
            if state.looked.elapsed() < LOOK_AGAIN {
                return state.client.clone();
            }
            // Others go on with what there is meanwhile.
            state.looked = Instant::now();
        }
        let shared = self.clone();
        // It panics only for a bug, and then what there is is still good.
        let _ = spawn_blocking(move || shared.renew()).await;
        self.state().client.clone()
    }

    /// Makes a new client if a file has changed. As long as that fails, the old one is used: files may be missing for a
    /// moment, or be of two generations.
    fn renew(&self) {
        let digest = self.state().digest.clone();
        if !self.origin.is_changed(&digest) {
            return;
        }
        match make(&self.origin, &self.proxies) {
            Ok((client, digest)) => {
                info!(origin = ?self.origin, "Certificates or tokens for the Kubernetes API have changed, using the new ones");
                let mut state = self.state();
                (state.client, state.digest, state.problem) = (client, digest, None);
            }
            Err(error) => {
                let problem = error.to_string();
                let mut state = self.state();
                if state.problem.as_ref() != Some(&problem) {
                    warn!(origin = ?self.origin, %error, "Certificates or tokens for the Kubernetes API have changed and can't be used, going on with the old ones");
                    state.problem = Some(problem);
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make(origin: &Origin, proxies: &Proxies) -> Result<(kube::Client, Digest), Error> {
    let Description { mut config, proxy, digest } = origin.read(proxies)?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.headers.push((
        "user-agent".parse().expect("a header name in lower case is valid"),
        USER_AGENT.parse().expect("a name, a slash and a version are a valid header value"),
    ));
    if let Some(proxy) = &proxy {
        let (server, proxy) = (&config.cluster_url, proxy.address());
        info!(%server, %proxy, "Asking the Kubernetes API through a proxy");
    }
    let client = by_way_of(proxy.as_ref(), &config);
    Ok((client.map_err(|source| Error::Client(Box::new(source)))?, digest))
}

/// A client that asks the server of `config` through `proxy`, if there is one.
fn by_way_of(proxy: Option<&Proxy>, config: &kube::Config) -> kube::Result<kube::Client> {
    let mut plain = HttpConnector::new();
    plain.enforce_http(false);
    let Some(proxy) = proxy else { return client(config, plain) };
    if proxy.address().scheme_str() != Some("https") {
        return client(config, tunnel(proxy, plain));
    }
    // Its certificate bears its own name, and is one that the cluster's CA has signed, as with kubectl.
    let mut to_proxy = config.clone();
    to_proxy.tls_server_name = None;
    client(config, tunnel(proxy, to_proxy.rustls_https_connector_with_connector(plain)?))
}

fn tunnel<C>(proxy: &Proxy, connector: C) -> Tunnel<C> {
    let tunnel = Tunnel::new(proxy.address().clone(), connector);
    match proxy.authorization() {
        Some(authorization) => tunnel.with_auth(authorization.clone()),
        None => tunnel,
    }
}

/// A client whose connections `connector` makes. As kube's own, but without retries: the loops that ask are the only ones
/// that retry, with their own pauses. Nor has it a deadline for answers: a watch may rightly be silent for a minute.
fn client<C>(config: &kube::Config, connector: C) -> kube::Result<kube::Client>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + Read + Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: Into<BoxError>,
{
    let tls = config.rustls_https_connector_with_connector(connector)?;
    let mut timed = TimeoutConnector::new(tls);
    timed.set_connect_timeout(config.connect_timeout);
    timed.set_write_timeout(config.write_timeout);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(legacy::Client::builder(TokioExecutor::new()).build(timed));
    Ok(kube::Client::new(service, config.default_namespace.clone()))
}

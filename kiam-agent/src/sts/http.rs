//! The SDK's HTTP clients: one that uses the environment's proxies, and one that never uses a proxy.
//!
//! The SDK's own is not used: it would compile HTTP/2 and a second client in, reads `NO_PROXY` differently from Go, and
//! uses the proxy for the metadata service.

use std::{
    error::Error as StdError,
    fmt, io, iter,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use aws_sdk_sts::config::SharedHttpClient;
use aws_smithy_runtime_api::client::{
    connection::{CaptureSmithyConnection, ConnectionMetadata},
    http::{
        HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
    },
    orchestrator::{HttpRequest, HttpResponse},
    result::ConnectorError,
    runtime_components::RuntimeComponents,
};
use aws_smithy_types::body::SdkBody;
use http::{Request, header::PROXY_AUTHORIZATION};
use http_body_util::BodyExt as _;
use hyper_rustls::HttpsConnector;
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
use rustls::{ClientConfig, RootCertStore, crypto::ring, version};
use rustls_native_certs::{CertificateResult, load_native_certs};
use tokio::time::{error::Elapsed, timeout};
use tower::BoxError;

use crate::{
    proxy::Proxies,
    transport::{self, Body, Client, Connector},
};

/// The system's certificates, read once.
static TRUST: LazyLock<Trust> = LazyLock::new(Trust::read);

struct Trust {
    tls: Arc<ClientConfig>,
    /// Why there are no certificates. No server is trusted then.
    missing: Option<String>,
}

/// A client without a proxy, for `https://` and `http://`.
pub(super) fn direct() -> SharedHttpClient {
    through(&Proxies::default())
}

/// A client that uses `proxies`.
pub(super) fn through(proxies: &Proxies) -> SharedHttpClient {
    let (proxies, pools) = (Arc::new(proxies.clone()), Mutex::default());
    SharedHttpClient::new(SdkClient { proxies, pools })
}

/// Fails with where CA certificates were looked for, if there are none.
pub(super) fn ensure_certificates() -> Result<(), &'static str> {
    TRUST.missing.as_deref().map_or(Ok(()), Err)
}

/// A client with connections for each deadline of a connection, as the SDK has different ones for STS and the IMDS.
struct SdkClient {
    proxies: Arc<Proxies>,
    pools: Mutex<Vec<(Option<Duration>, Client)>>,
}

/// A client with its deadline for the head of an answer.
struct SdkConnector {
    proxies: Arc<Proxies>,
    client: Client,
    deadline: Option<Duration>,
}

// === impl Trust ===

impl Trust {
    fn read() -> Self {
        let CertificateResult { certs, errors, .. } = load_native_certs();
        let missing = certs.is_empty().then(|| match errors.is_empty() {
            true => "the system has none".to_owned(),
            false => errors.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        });
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certs);
        let versions = ClientConfig::builder_with_provider(ring::default_provider().into())
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])
            .expect("ring has cipher suites for both versions");
        let tls = versions.with_root_certificates(roots).with_no_client_auth();
        Self { tls: Arc::new(tls), missing }
    }
}

// === impl SdkClient ===

impl SdkClient {
    fn client(&self, deadline: Option<Duration>) -> Client {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, client)) = pools.iter().find(|(its, _)| *its == deadline) {
            return client.clone();
        }
        let tls = &TRUST.tls;
        let connector = Connector::through(self.proxies.clone(), tls.clone());
        let mut timed = TimeoutConnector::new(HttpsConnector::from((connector, tls.clone())));
        timed.set_connect_timeout(deadline);
        let client = transport::client(timed);
        pools.push((deadline, client.clone()));
        client
    }
}

impl HttpClient for SdkClient {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let (proxies, client) = (self.proxies.clone(), self.client(settings.connect_timeout()));
        let deadline = settings.read_timeout();
        SharedHttpConnector::new(SdkConnector { proxies, client, deadline })
    }
}

impl fmt::Debug for SdkClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SdkClient").field("proxies", &self.proxies).finish_non_exhaustive()
    }
}

// === impl SdkConnector ===

impl SdkConnector {
    /// The request as it is sent. A forwarding proxy gets its password in this request, a tunnelling one in its CONNECT.
    fn prepared(&self, request: HttpRequest) -> Result<Request<Body>, ConnectorError> {
        let request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()));
        let mut request = request?.map(|body| body.map_err(BoxError::from).boxed_unsync());
        let proxy = self.proxies.of(request.uri()).and_then(|proxy| proxy.authorization());
        if let (Some("http"), Some(authorization)) = (request.uri().scheme_str(), proxy) {
            request.headers_mut().insert(PROXY_AUTHORIZATION, authorization.clone());
        }
        let connection = capture_connection(&mut request);
        if let Some(captured) = request.extensions().get::<CaptureSmithyConnection>() {
            captured.set_connection_retriever(move || poisonable(&connection));
        }
        Ok(request)
    }
}

impl HttpConnector for SdkConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let request = match self.prepared(request) {
            Ok(request) => request,
            Err(error) => return HttpConnectorFuture::ready(Err(error)),
        };
        let (answer, deadline) = (self.client.request(request), self.deadline);
        HttpConnectorFuture::new(async move {
            let answer = match deadline {
                Some(deadline) => timeout(deadline, answer)
                    .await
                    .map_err(|elapsed: Elapsed| ConnectorError::timeout(elapsed.into()))?,
                None => answer.await,
            };
            let answer = answer.map_err(|error| failed(error.into()))?;
            HttpResponse::try_from(answer.map(SdkBody::from_body_1_x))
                .map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

impl fmt::Debug for SdkConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SdkConnector").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// The connection of a request, which the SDK does not use again after a server's error.
fn poisonable(connection: &CaptureConnection) -> Option<ConnectionMetadata> {
    let proxied = connection.connection_metadata().as_ref()?.is_proxied();
    let connection = connection.clone();
    let poison = move || {
        if let Some(connected) = connection.connection_metadata().as_ref() {
            connected.poison();
        }
    };
    Some(ConnectionMetadata::builder().proxied(proxied).poison_fn(poison).build())
}

/// The SDK tells timeouts from other errors, which all may pass.
fn failed(error: BoxError) -> ConnectorError {
    let first: &(dyn StdError + 'static) = &*error;
    let mut causes = iter::successors(Some(first), |cause| (*cause).source());
    let late = causes.any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
    });
    if late { ConnectorError::timeout(error) } else { ConnectorError::io(error) }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// The error of a request to `server`, whose answer may take `deadline`.
    async fn error(server: &str, deadline: Duration) -> ConnectorError {
        let proxies = Arc::<Proxies>::default();
        let sdk = SdkClient { proxies: proxies.clone(), pools: Mutex::default() };
        let client = sdk.client(Some(Duration::from_secs(3)));
        let connector = SdkConnector { proxies, client, deadline: Some(deadline) };
        let request = HttpRequest::get(format!("http://{server}/")).unwrap();
        connector.call(request).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_silent_server_is_late_and_one_that_is_not_there_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap().to_string();
        let late = error(&server, Duration::from_millis(100)).await;
        assert!(late.is_timeout(), "{late:?}");
        drop(listener);
        let gone = error(&server, Duration::from_secs(60)).await;
        assert!(gone.is_io(), "{gone:?}");
    }

    #[test]
    fn each_deadline_has_its_connections() {
        let sdk = SdkClient { proxies: Arc::default(), pools: Mutex::default() };
        for deadline in [Some(1), None, Some(1), Some(3), None] {
            sdk.client(deadline.map(Duration::from_secs));
        }
        assert_eq!(sdk.pools.into_inner().unwrap().len(), 3);
    }
}

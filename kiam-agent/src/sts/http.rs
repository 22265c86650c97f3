//! The HTTP clients: one that uses the environment's proxies, and one that never uses a proxy.

use std::sync::LazyLock;

use aws_sdk_sts::config::SharedHttpClient;
use aws_smithy_http_client::{
    Builder, Connector,
    proxy::ProxyConfig,
    tls::{self, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use aws_smithy_runtime_api::{
    client::{
        http::{
            HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings,
            SharedHttpConnector,
        },
        orchestrator::HttpRequest,
        runtime_components::RuntimeComponents,
    },
    shared::IntoShared as _,
};
use http::Uri;
use rustls_native_certs::{CertificateResult, load_native_certs};

use crate::proxy::{Proxies, Proxy};

/// Whether there are CA certificates, which the SDK's clients read once, too.
static CERTIFICATES: LazyLock<Result<(), String>> = LazyLock::new(|| {
    let CertificateResult { certs, errors, .. } = load_native_certs();
    if !certs.is_empty() {
        return Ok(());
    }
    if errors.is_empty() {
        return Err("the system has none".to_owned());
    }
    let errors: Vec<_> = errors.iter().map(ToString::to_string).collect();
    Err(errors.join(", "))
});

/// A client without a proxy, for `https://` and `http://`.
pub(super) fn direct() -> SharedHttpClient {
    Builder::new()
        .tls_provider(tls::Provider::Rustls(CryptoMode::Ring))
        .tls_context(trust())
        .build_https()
}

/// Fails with where CA certificates were looked for, if there are none.
pub(super) fn ensure_certificates() -> Result<(), &'static str> {
    CERTIFICATES.as_ref().copied().map_err(String::as_str)
}

/// The system's certificates. Without any, no server is trusted: the SDK's debug builds would panic.
fn trust() -> TlsContext {
    let builder = TlsContext::builder();
    let builder = match ensure_certificates() {
        Ok(()) => builder,
        Err(_) => builder.with_trust_store(TrustStore::empty()),
    };
    builder.build().unwrap_or_default()
}

/// A client that uses `proxies`.
///
/// The SDK's own support is not used: it reads `NO_PROXY` differently from Go, and uses the proxy for the metadata
/// service.
pub(super) fn through(proxies: &Proxies) -> SharedHttpClient {
    let [http, https] = proxies.both().map(|proxy| proxy.map(by));
    if http.is_none() && https.is_none() {
        return direct();
    }
    ProxyRoutes { proxies: proxies.clone(), by: ByScheme { direct: direct(), http, https } }
        .into_shared()
}

fn by(proxy: &Proxy) -> SharedHttpClient {
    let config = ProxyConfig::all(proxy.url().expose()).expect("Proxy::parse accepts only URLs");
    let trust = trust();
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut builder = Connector::builder().proxy_config(config.clone());
        builder.set_connector_settings(settings.cloned());
        builder.set_sleep_impl(components.and_then(RuntimeComponents::sleep_impl));
        let builder = builder.tls_provider(tls::Provider::Rustls(CryptoMode::Ring));
        builder.tls_context(trust.clone()).build()
    })
}

/// The clients without a proxy, and with the proxies for each scheme.
#[derive(Debug)]
struct ByScheme<T> {
    direct: T,
    http: Option<T>,
    https: Option<T>,
}

/// A client that selects a proxy for each request: an [`HttpClient`], or with connectors an [`HttpConnector`].
#[derive(Debug)]
struct ProxyRoutes<T> {
    proxies: Proxies,
    by: ByScheme<T>,
}

impl HttpClient for ProxyRoutes<SharedHttpClient> {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        let connector = |client: &SharedHttpClient| client.http_connector(settings, components);
        let ByScheme { direct, http, https } = &self.by;
        let by = ByScheme {
            direct: connector(direct),
            http: http.as_ref().map(connector),
            https: https.as_ref().map(connector),
        };
        SharedHttpConnector::new(ProxyRoutes { proxies: self.proxies.clone(), by })
    }
}

impl HttpConnector for ProxyRoutes<SharedHttpConnector> {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let ByScheme { direct, http, https } = &self.by;
        let by = request.uri().parse().ok().and_then(|uri: Uri| {
            self.proxies.of(&uri)?;
            if uri.scheme_str() == Some("https") { https.as_ref() } else { http.as_ref() }
        });
        by.unwrap_or(direct).call(request)
    }
}

//! The HTTP clients: one for what is asked through proxies where the environment names some, and one for what never is.

use aws_sdk_sts::config::SharedHttpClient;
use aws_smithy_http_client::{
    Builder, Connector,
    proxy::ProxyConfig,
    tls::{self, rustls_provider::CryptoMode},
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

use crate::proxy::{Proxies, Proxy};

/// A client that asks nobody by way of a proxy; it speaks `http://` too.
pub(super) fn direct() -> SharedHttpClient {
    Builder::new().tls_provider(tls::Provider::Rustls(CryptoMode::Ring)).build_https()
}

/// A client that asks each host as `proxies` says.
///
/// The SDK's own reading of the variables would do neither: it takes other hosts for those in `NO_PROXY` than Go does, and
/// asks the metadata service through the proxy.
pub(super) fn through(proxies: &Proxies) -> SharedHttpClient {
    let [http, https] = proxies.both().map(|proxy| proxy.map(by));
    if http.is_none() && https.is_none() {
        return direct();
    }
    ProxyRoutes { proxies: proxies.clone(), by: ByScheme { direct: direct(), http, https } }
        .into_shared()
}

fn by(proxy: &Proxy) -> SharedHttpClient {
    let config = ProxyConfig::all(proxy.url().expose()).expect("what Proxy::parse takes is a URL");
    Builder::new().build_with_connector_fn(move |settings, components| {
        let mut builder = Connector::builder().proxy_config(config.clone());
        builder.set_connector_settings(settings.cloned());
        builder.set_sleep_impl(components.and_then(RuntimeComponents::sleep_impl));
        builder.tls_provider(tls::Provider::Rustls(CryptoMode::Ring)).build()
    })
}

/// Ways to a host.
#[derive(Debug)]
struct ByScheme<T> {
    direct: T,
    http: Option<T>,
    https: Option<T>,
}

/// As [`HttpClient`] and, with its connectors, as [`HttpConnector`].
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

//! The connections to the Kubernetes API and STS: clients of one type, however they reach their server. The client is then
//! compiled once, which is half a megabyte each time.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Uri, uri::Scheme};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::HttpsConnector;
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connected, Connection, HttpConnector, proxy::Tunnel},
    },
    rt::{TokioExecutor, TokioTimer},
};
use rustls::ClientConfig;
use tower::{BoxError, Service, ServiceExt as _, service_fn, util::BoxCloneSyncService};

use crate::proxy::{Proxies, Proxy};

/// An HTTP client, which speaks HTTP/1.1 alone. Unlike those of kube and of the AWS SDK it does not retry, but sends a
/// request again of which a kept connection, closed meanwhile, has taken nothing.
pub(crate) type Client = legacy::Client<TimeoutConnector<HttpsConnector<Connector>>, Body>;
/// The body of a request.
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// A way to a server, before TLS.
#[derive(Clone)]
pub(crate) struct Connector(BoxCloneSyncService<Uri, Stream, BoxError>);

/// A connection to a server, or to the proxy before it.
pub(crate) struct Stream {
    io: Box<dyn Transport>,
    /// Whether the other side is a proxy, which must be told the whole URI.
    forwards: bool,
}

trait Transport: Connection + Read + Write + Send + Unpin {}

impl<T: Connection + Read + Write + Send + Unpin> Transport for T {}

/// A client whose connections `connector` makes.
pub(crate) fn client(connector: TimeoutConnector<HttpsConnector<Connector>>) -> Client {
    let mut builder = legacy::Client::builder(TokioExecutor::new());
    // Without a timer, idle connections are kept until they are needed.
    builder.pool_timer(TokioTimer::new()).build(connector)
}

/// Connects to any server, whatever the scheme.
pub(crate) fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp
}

fn tunnel<C>(proxy: &Proxy, connector: C) -> Tunnel<C> {
    let tunnel = Tunnel::new(proxy.address().clone(), connector);
    match proxy.authorization() {
        Some(authorization) => tunnel.with_auth(authorization.clone()),
        None => tunnel,
    }
}

// === impl Connector ===

impl Connector {
    /// Connects without a proxy.
    pub(crate) fn direct() -> Self {
        Self::new(tcp())
    }

    /// Connects by a tunnel through `proxy`, to which `connector` connects.
    pub(crate) fn tunnel<C>(proxy: &Proxy, connector: C) -> Self
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: Connection + Read + Write + Send + Unpin + 'static,
        C::Future: Send + 'static,
        C::Error: Into<BoxError>,
    {
        Self::new(tunnel(proxy, connector))
    }

    /// Connects through the proxy that `proxies` has for each destination, if there is one: by a tunnel for `https://`,
    /// else so that the proxy forwards each request. `tls` is for the proxies themselves.
    pub(crate) fn through(proxies: Arc<Proxies>, tls: Arc<ClientConfig>) -> Self {
        let to_proxy = HttpsConnector::from((tcp(), tls));
        let connect = move |server: Uri| {
            let (proxies, to_proxy) = (proxies.clone(), to_proxy.clone());
            async move {
                let Some(proxy) = proxies.of(&server) else {
                    return Ok(Stream::new(tcp().oneshot(server).await?));
                };
                if server.scheme() == Some(&Scheme::HTTPS) {
                    return Ok(Stream::new(tunnel(proxy, to_proxy).oneshot(server).await?));
                }
                let stream = Stream::new(to_proxy.oneshot(proxy.address().clone()).await?);
                Ok(Stream { forwards: true, ..stream })
            }
        };
        Self(BoxCloneSyncService::new(service_fn(connect)))
    }

    fn new<C>(connector: C) -> Self
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: Connection + Read + Write + Send + Unpin + 'static,
        C::Future: Send + 'static,
        C::Error: Into<BoxError>,
    {
        let connector = connector.map_response(Stream::new);
        Self(BoxCloneSyncService::new(connector.map_err(Into::into)))
    }
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Stream, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        self.0.call(server)
    }
}

// === impl Stream ===

impl Stream {
    fn new(io: impl Transport + 'static) -> Self {
        Self { io: Box::new(io), forwards: false }
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        self.io.connected().proxy(self.forwards)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }
}

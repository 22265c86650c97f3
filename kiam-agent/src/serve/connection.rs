//! Serves one connection with hyper.

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{CONNECTION, RETRY_AFTER},
};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::{net::TcpStream, time::sleep};
use tracing::debug;

use super::{
    Config, Metrics, PodService, limits::Slot, metrics::Rejection, report::Report, share::Turn,
};
use kiam_core::{
    lifecycle::Drain,
    pods::{Client, Unattested},
};

/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Most header fields of a request: SDKs send ten, a mesh adds ten, and tracing may add many more.
const MAX_FIELDS: usize = 128;

/// The task of one connection.
pub(super) struct ConnectionTask<S> {
    pub(super) service: Arc<S>,
    pub(super) config: Config,
    pub(super) metrics: Metrics,
    pub(super) drain: Drain,
    pub(super) report: Arc<Report<S>>,
    pub(super) slot: Slot,
    pub(super) peer: SocketAddr,
}

// === impl ConnectionTask ===

impl<S: PodService> ConnectionTask<S> {
    /// Serves `stream`, or passes it on, until it closes or fails, or the drain begins and begun requests are answered. It
    /// takes turns with the other connections of the same owner.
    pub(super) async fn run(self, stream: TcpStream, client: Result<Client, Unattested>) {
        let turn = Turn::default();
        self.slot.share().in_turns(&turn, self.serve(stream, client, &turn)).await;
    }

    async fn serve(&self, stream: TcpStream, client: Result<Client, Unattested>, turn: &Turn) {
        // A failure only costs a delay.
        let _ = stream.set_nodelay(true);
        // A client that never reads would otherwise hold its slot for ever: see TCP_USER_TIMEOUT in tcp(7).
        let unread = u32::try_from(self.config.unread_deadline.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = set_tcp_user_timeout(&stream, unread) {
            debug!(%error, "Setting TCP_USER_TIMEOUT on a connection failed");
        }
        let client = match client {
            Err(error) => Err(error),
            Ok(client) => match self.service.relay(&client).await {
                Ok(None) => Ok(client),
                Ok(Some(relay)) => {
                    let outcome = relay.run(stream, &self.config, self.drain.clone()).await;
                    return self.metrics.relayed(outcome);
                }
                Err(not_found) => Err(Unattested::Unknown { client, not_found }),
            },
        };
        self.answer(stream, client, turn).await;
    }

    async fn answer(&self, stream: TcpStream, client: Result<Client, Unattested>, turn: &Turn) {
        let known = client.is_ok();
        let client = Arc::new(client);
        let answer = service_fn(|request| {
            let client = client.clone();
            async move { Ok::<_, Infallible>(self.respond(client, request, turn).await) }
        });
        // Idle until the first request, and between requests.
        self.slot.idle();
        let mut drain = self.drain.clone();
        let deadline =
            if known { self.config.header_deadline } else { self.config.stranger_deadline };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .keep_alive(known)
            .header_read_timeout(deadline)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_FIELDS)
            .serve_connection(TokioIo::new(stream), answer);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = no_more_requests(&mut drain, self.config.last_requests) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(%error, "Connection ended with an error");
        }
    }

    /// Answers one request, in the connection's turn. hyper reads the next one after the answer.
    async fn respond(
        &self,
        client: Arc<Result<Client, Unattested>>,
        request: Request<Incoming>,
        turn: &Turn,
    ) -> Response<Full<Bytes>> {
        self.slot.busy();
        turn.next().await;
        let mut response = if self.slot.share().admits() {
            self.service.call(client, request).await
        } else {
            self.report.rejected(Rejection::Requests, Some(&client), self.peer);
            too_many()
        };
        if self.drain.is_started() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        self.slot.idle();
        response
    }
}

/// The answer to a request beyond the rate. It ends the connection, so that further requests on it cost nothing.
fn too_many() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    let headers = response.headers_mut();
    headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Waits for the end of further requests, a while after the drain began: hyper would close a connection whose first request
/// is still on its way. See `last_requests`.
async fn no_more_requests(drain: &mut Drain, last_requests: Duration) {
    drain.started().await;
    sleep(last_requests).await;
}

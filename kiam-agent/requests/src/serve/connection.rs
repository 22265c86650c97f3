//! Serves one connection with hyper.

use std::{
    convert::Infallible, future::poll_fn, net::SocketAddr, pin::pin, sync::Arc, task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{CONNECTION, RETRY_AFTER},
};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};
use tracing::debug;

use super::{
    Config, Metrics, PodService, limits::Slot, metrics::Rejection, rarely::Rarely, report::Report,
    share::Turn,
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
        let (known, session) = (client.is_ok(), S::Session::default());
        let (client, session) = (&client, &session);
        let answer = service_fn(|request| async move {
            Ok::<_, Infallible>(self.respond(client, session, request, turn).await)
        });
        // Idle until the first request, and between requests.
        self.slot.idle(Instant::now());
        let deadline =
            if known { self.config.header_deadline } else { self.config.stranger_deadline };
        let connection = http1::Builder::new()
            // hyper would set a timer for each request.
            .header_read_timeout(None)
            // Answers are short, and one buffer costs the kernel less than two.
            .writev(false)
            .keep_alive(known)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_FIELDS)
            .serve_connection(TokioIo::new(stream), answer);
        let mut connection = pin!(connection);
        let (mut drain, mut overdue) = (self.drain.clone(), pin!(self.slot.idle_for(deadline)));
        let mut drained = pin!(no_more_requests(&mut drain, self.config.last_requests));
        let (mut drained, mut overdue) =
            (Some(Rarely::new(drained.as_mut())), Rarely::new(overdue.as_mut()));
        let ended = poll_fn(|context| {
            if drained.as_mut().is_some_and(|drained| drained.poll(context).is_ready()) {
                drained = None;
                connection.as_mut().graceful_shutdown();
            }
            match connection.as_mut().poll(context) {
                Poll::Ready(ended) => Poll::Ready(Some(ended)),
                Poll::Pending => overdue.poll(context).map(|()| None),
            }
        });
        match ended.await {
            Some(Ok(())) => {}
            Some(Err(error)) => debug!(%error, "Connection ended with an error"),
            None => debug!("Connection sent no request in time"),
        }
    }

    /// Answers one request, in the connection's turn. hyper reads the next one after the answer.
    async fn respond(
        &self,
        client: &Result<Client, Unattested>,
        session: &S::Session,
        request: Request<Incoming>,
        turn: &Turn,
    ) -> Response<Full<Bytes>> {
        self.slot.busy();
        turn.next().await;
        let mut response = if self.slot.share().admits() {
            self.service.call(client, session, request).await
        } else {
            self.report.rejected(Rejection::Requests, Some(client), self.peer);
            too_many()
        };
        if self.drain.is_started() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        self.slot.idle(Instant::now());
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

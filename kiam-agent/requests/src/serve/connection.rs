//! Serves one connection with hyper.

use std::{
    convert::Infallible,
    future::{pending, poll_fn},
    net::SocketAddr,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{
    HeaderValue, Request, Response, StatusCode,
    header::{CONNECTION, RETRY_AFTER},
};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    time::{Instant, sleep},
};
use tracing::{debug, error};

use super::{
    Config, Metrics, PodService, limits::Slot, metrics::Rejection, rarely::Rarely, report::Report,
    share::Pipeline,
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
    /// Serves `stream`, or passes it on, until it closes or fails, or has to end, or the drain begins and begun requests are
    /// answered. A panic ends this connection alone.
    pub(super) async fn run(self, stream: TcpStream, client: Result<Client, Unattested>) {
        if AssertUnwindSafe(self.serve(stream, client)).catch_unwind().await.is_err() {
            error!("A connection's task panicked");
        }
    }

    async fn serve(&self, stream: TcpStream, client: Result<Client, Unattested>) {
        let client = match client {
            Err(error) => Err(error),
            Ok(client) => match self.before_end(self.service.relay(&client)).await {
                None => return,
                Some(Ok(None)) => Ok(client),
                Some(Ok(Some(relay))) => {
                    let relayed = relay.run(stream, &self.config, self.drain.clone());
                    if let Some(outcome) = self.before_end(relayed).await {
                        self.metrics.relayed(outcome);
                    }
                    return;
                }
                Some(Err(not_found)) => Err(Unattested::Unknown { client, not_found }),
            },
        };
        self.answer(stream, client).await;
    }

    /// The result of `work`; `None` if the connection has to end before.
    async fn before_end<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            () = self.slot.ended() => None,
            result = work => Some(result),
        }
    }

    async fn answer(&self, stream: TcpStream, client: Result<Client, Unattested>) {
        let (known, session) = (client.is_ok(), S::Session::default());
        let pipeline = &Pipeline::default();
        let (client, session) = (&client, &session);
        let answer = service_fn(|request| async move {
            Ok::<_, Infallible>(self.respond(client, session, request, pipeline).await)
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
        let no_more = AtomicBool::new(false);
        let (mut ends, mut overdue) =
            (pin!(self.ends(&no_more)), pin!(self.slot.idle_for(deadline)));
        let (mut ends, mut overdue) = (Rarely::new(ends.as_mut()), Rarely::new(overdue.as_mut()));
        let mut is_last = false;
        let ended = poll_fn(|context| {
            pipeline.polled();
            if ends.poll(context).is_ready() {
                return Poll::Ready(None);
            }
            if !is_last && no_more.load(Ordering::Relaxed) {
                is_last = true;
                connection.as_mut().graceful_shutdown();
            }
            match connection.as_mut().poll(context) {
                Poll::Ready(ended) => Poll::Ready(Some(ended)),
                // Not before: a request that has come makes the connection busy.
                Poll::Pending => overdue.poll(context).map(|()| None),
            }
        });
        match ended.await {
            Some(Ok(())) => {}
            Some(Err(error)) => debug!(%error, "Connection ended with an error"),
            None => debug!("Connection sent no request in time, or was ended for another"),
        }
    }

    /// Returns when the connection has to end at once. Sets `no_more` a while after the drain began, when it may answer what
    /// it has begun, and nothing else.
    async fn ends(&self, no_more: &AtomicBool) {
        let mut drain = self.drain.clone();
        let drained = async {
            no_more_requests(&mut drain, self.config.last_requests).await;
            no_more.store(true, Ordering::Relaxed);
            pending().await
        };
        tokio::select! {
            () = self.slot.ended() => {}
            () = drained => {}
        }
    }

    /// Answers one request. hyper reads the next one after the answer.
    async fn respond(
        &self,
        client: &Result<Client, Unattested>,
        session: &S::Session,
        request: Request<Incoming>,
        pipeline: &Pipeline,
    ) -> Response<Full<Bytes>> {
        self.slot.busy();
        pipeline.next().await;
        let now = Instant::now();
        let mut response = if self.slot.share().admits(now) {
            self.service.call(client, session, request, now).await
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

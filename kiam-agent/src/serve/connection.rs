//! One connection, by hyper.

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use http::{HeaderValue, header::CONNECTION};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::{net::TcpStream, time::sleep};
use tracing::debug;

use super::{Config, Metrics, PodService};
use crate::{
    lifecycle::Drain,
    pods::{Client, Unattested},
};

/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Most header fields of a request: SDKs send ten, a mesh adds ten, and tracing may add many more.
const MAX_FIELDS: usize = 128;

/// What a connection's task needs.
pub(super) struct Served<S> {
    pub(super) service: Arc<S>,
    pub(super) config: Config,
    pub(super) metrics: Metrics,
    pub(super) drain: Drain,
}

// === impl Served ===

impl<S: PodService> Served<S> {
    /// Serves `stream`, or passes it on, until it closes, errs, or the drain begins and what has begun is
    /// answered.
    pub(super) async fn run(self, stream: TcpStream, client: Result<Client, Unattested>) {
        // A failure costs a delay at most.
        let _ = stream.set_nodelay(true);
        // Else who asks and never reads would hold its slot for ever: see TCP_USER_TIMEOUT in tcp(7).
        let unread = u32::try_from(self.config.unread_deadline.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = set_tcp_user_timeout(&stream, unread) {
            debug!(%error, "Connection without a deadline for what it leaves unread");
        }
        let client = match client {
            Err(error) => Err(error),
            Ok(client) => match self.service.relay(&client).await {
                Ok(None) => Ok(client),
                Ok(Some(relay)) => {
                    let outcome = relay.run(stream, &self.config, self.drain).await;
                    return self.metrics.relayed(outcome);
                }
                Err(not_found) => Err(Unattested::Unknown { client, not_found }),
            },
        };
        self.answer(stream, client).await;
    }

    async fn answer(mut self, stream: TcpStream, client: Result<Client, Unattested>) {
        let known = client.is_ok();
        let client = Arc::new(client);
        let draining = self.drain.clone();
        let answer = service_fn(|request| {
            let (service, client) = (self.service.clone(), client.clone());
            let draining = draining.clone();
            async move {
                let mut response = service.call(client, request).await;
                if draining.is_started() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            }
        });
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
            () = no_more_requests(&mut self.drain, self.config.last_requests) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(%error, "Connection ended with an error");
        }
    }
}

/// hyper would close a connection whose first request is still on its way, so that comes a while after the
/// drain began: see `last_requests`.
async fn no_more_requests(drain: &mut Drain, last_requests: Duration) {
    drain.started().await;
    sleep(last_requests).await;
}

//! One connection, by hyper.

use std::{convert::Infallible, pin::pin, sync::Arc};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::net::TcpStream;
use tracing::debug;

use super::{Config, PodService};
use crate::{
    lifecycle::Drain,
    pods::{Client, Unattested},
};

/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Most header fields of a request.
const MAX_FIELDS: usize = 64;

/// Serves `stream` until it closes, errs, or the drain begins and what has begun is answered.
pub(super) async fn serve<S: PodService>(
    stream: TcpStream,
    client: Arc<Result<Client, Unattested>>,
    service: Arc<S>,
    config: Config,
    mut drain: Drain,
) {
    // A failure costs a delay at most.
    let _ = stream.set_nodelay(true);
    // Else who asks and never reads would hold its slot for ever: see TCP_USER_TIMEOUT in tcp(7).
    let unread = u32::try_from(config.unread_deadline.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = set_tcp_user_timeout(&stream, unread) {
        debug!(%error, "Connection without a deadline for what it leaves unread");
    }
    let answer = service_fn(|request| {
        let service = service.clone();
        let client = client.clone();
        async move { Ok::<_, Infallible>(service.call(client, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.header_deadline)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = drain.started() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "Connection ended with an error");
    }
}

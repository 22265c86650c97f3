//! One accept loop over all listeners: deadlines, connection limits, peer address, drain.
//!
//! Who is calling is resolved once, right after accept; each request is authorised anew.

mod connection;
mod limits;
mod metrics;

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, error, warn};

use self::limits::Limits;
pub use self::metrics::Metrics;
use crate::{
    lifecycle::Drain,
    pods::{Client, ClientResolver, Connection, Unattested},
};

/// Answers pods' requests; `imds` provides it.
pub trait PodService: Send + Sync + 'static {
    /// Answers one request of `client`, whose identity was resolved when it connected.
    fn call(
        &self,
        client: Arc<Result<Client, Unattested>>,
        request: Request<Incoming>,
    ) -> impl Future<Output = Response<Full<Bytes>>> + Send;
}

/// Limits and deadlines of connections.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Open connections in all.
    pub connections: usize,
    /// Open connections from one address.
    pub connections_per_peer: usize,
    /// How long the head of a request may take, and a connection may lie idle.
    pub header_deadline: Duration,
    /// How long the other end may leave what it is sent unread.
    pub unread_deadline: Duration,
    /// How long after the drain began connections are still accepted: what was redirected here just before
    /// is on its way into the queue, and closing that resets it. Not where another agent has the queue.
    pub late_accepts: Duration,
    /// How long after the drain began an open connection may bring further requests; each answer says that the
    /// next belongs on a new connection.
    pub last_requests: Duration,
    /// How long what has begun may go on once no connection is accepted.
    pub drain_deadline: Duration,
}

/// A listening socket and who tells whose its connections are; inside a pod, later, that may be another.
pub struct Listener {
    /// Listening.
    pub socket: TcpListener,
    /// Resolves its connections.
    pub resolver: Arc<dyn ClientResolver>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connections: 8192,
            connections_per_peer: 1024,
            header_deadline: Duration::from_secs(60),
            unread_deadline: Duration::from_secs(30),
            late_accepts: Duration::from_millis(500),
            last_requests: Duration::from_secs(1),
            drain_deadline: Duration::from_secs(5),
        }
    }
}

/// Serves all `listeners` until the drain begins, and then finishes what has begun.
pub async fn run<S: PodService>(
    listeners: Vec<Listener>,
    service: Arc<S>,
    config: Config,
    metrics: Metrics,
    drain: Drain,
) {
    let limits = Limits::new(config.connections, config.connections_per_peer);
    let mut loops = JoinSet::new();
    for listener in listeners {
        let server = Server {
            service: service.clone(),
            config,
            limits: limits.clone(),
            metrics: metrics.clone(),
            drain: drain.clone(),
        };
        loops.spawn(server.accept(listener));
    }
    while loops.join_next().await.is_some() {}
}

/// What every accept loop has.
struct Server<S> {
    service: Arc<S>,
    config: Config,
    limits: Limits,
    metrics: Metrics,
    drain: Drain,
}

// === impl Server ===

impl<S: PodService> Server<S> {
    async fn accept(self, listener: Listener) {
        let mut connections = JoinSet::new();
        let mut drain = self.drain.clone();
        self.accept_until(drain.started(), &listener, &mut connections).await;
        if !drain.is_queue_handed_over() {
            let late = sleep(self.config.late_accepts);
            self.accept_until(late, &listener, &mut connections).await;
        }
        drop(listener);
        let all = async { while connections.join_next().await.is_some() {} };
        if timeout(self.config.drain_deadline, all).await.is_err() {
            warn!("Connections were still open at the end of the drain");
        }
    }

    async fn accept_until(
        &self,
        end: impl Future<Output = ()>,
        listener: &Listener,
        connections: &mut JoinSet<()>,
    ) {
        let mut end = pin!(end);
        loop {
            tokio::select! {
                accepted = listener.socket.accept() => match accepted {
                    Ok((stream, peer)) => self.take(stream, peer, listener, connections),
                    Err(error) => {
                        // Mostly "too many open files": it passes when connections close.
                        warn!(%error, "Connection not accepted");
                        sleep(Duration::from_millis(50)).await;
                    }
                },
                Some(ended) = connections.join_next() => {
                    // The connection is lost, and no other.
                    if let Err(error) = ended {
                        error!(%error, "Connection's task failed");
                    }
                }
                () = end.as_mut() => return,
            }
        }
    }

    fn take(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        listener: &Listener,
        connections: &mut JoinSet<()>,
    ) {
        let Some(slot) = self.limits.take(canonical(peer)) else {
            self.metrics.refused();
            debug!(pod.ip = %peer.ip(), "Too many connections; closed");
            return;
        };
        let Ok(local) = stream.local_addr() else { return };
        let client = listener.resolver.resolve(&Connection { peer, local });
        self.metrics.accepted(client.as_ref().err());
        if let Err(error) = &client {
            warn!(pod.ip = %peer.ip(), %error, "Connection belongs to no pod");
        }
        let service = self.service.clone();
        let config = self.config;
        let drain = self.drain.clone();
        connections.spawn(async move {
            connection::serve(stream, Arc::new(client), service, config, drain).await;
            drop(slot);
        });
    }
}

fn canonical(peer: SocketAddr) -> IpAddr {
    peer.ip().to_canonical()
}

#[cfg(test)]
mod tests;

//! One accept loop over all listeners: deadlines, connection limits, peer address, drain.
//!
//! Who is calling is resolved once, right after accept; each request is authorised anew.

mod connection;
mod limits;
mod metrics;
mod relay;

use std::{
    future::Future, mem::Discriminant, net::SocketAddr, pin::pin, sync::Arc, time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use self::limits::Limits;
pub use self::{
    limits::{Owner, raise_open_files},
    metrics::Metrics,
    relay::Relay,
};
use crate::{
    lifecycle::Drain,
    pods::{Client, ClientResolver, Connection, NotFound, Unattested},
    telemetry::LogLimit,
};

/// Connections that may wait to be accepted; tokio's 128 are fewer than a node's pods open at once, and a
/// SYN that finds no place is sent again only after a second. The system may allow fewer (`somaxconn`).
const BACKLOG: i32 = 4096;
/// How often the same trouble with connections is logged.
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// Answers pods' requests; `imds` provides it.
pub trait PodService: Send + Sync + 'static {
    /// Where the connection of `client` is passed on to before a byte of it is read; `None`: nowhere.
    ///
    /// # Errors
    ///
    /// [`NotFound`] when it is not certain whose the connection is; it is then called with
    /// [`Unattested::Unknown`], once, and closed.
    fn relay(
        &self,
        client: &Client,
    ) -> impl Future<Output = Result<Option<Relay>, NotFound>> + Send;

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
    /// Open files that are kept for all but connections.
    pub other_files: usize,
    /// Open connections of one pod, or of one address where only that is known; far fewer once half of all are
    /// open.
    pub connections_per_pod: usize,
    /// Open connections that are no pod's, together.
    pub connections_of_strangers: usize,
    /// How long a connection may take, from its last answer, until the head of a request is there.
    pub header_deadline: Duration,
    /// The same for a connection that is no pod's.
    pub stranger_deadline: Duration,
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
    /// How long the connection to pass on to may take.
    pub relay_connect: Duration,
    /// How long a connection that is passed on may lie idle.
    pub relay_idle: Duration,
    /// How long a connection may be passed on in all.
    pub relay_total: Duration,
}

/// A listening socket and who tells whose its connections are.
pub struct Listener {
    /// Listening.
    pub socket: Arc<TcpListener>,
    /// Resolves its connections.
    pub resolver: Arc<dyn ClientResolver>,
    /// Cancelled when nothing more is to be accepted: the pod that it is inside of is gone.
    pub closed: CancellationToken,
}

// === impl Listener ===

impl Listener {
    /// One of the node, that is there as long as the agent is.
    #[must_use]
    pub fn new(socket: TcpListener, resolver: Arc<dyn ClientResolver>) -> Self {
        Self { socket: Arc::new(socket), resolver, closed: CancellationToken::new() }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connections: 8192,
            other_files: 256,
            connections_per_pod: 512,
            connections_of_strangers: 256,
            header_deadline: Duration::from_secs(60),
            stranger_deadline: Duration::from_secs(5),
            unread_deadline: Duration::from_secs(30),
            late_accepts: Duration::from_millis(500),
            last_requests: Duration::from_secs(1),
            drain_deadline: Duration::from_secs(5),
            relay_connect: Duration::from_secs(1),
            relay_idle: Duration::from_secs(60),
            relay_total: Duration::from_secs(3600),
        }
    }
}

/// Serves all `listeners` until the drain begins, and then finishes what has begun.
pub async fn run<S: PodService>(
    mut listeners: mpsc::Receiver<Listener>,
    service: Arc<S>,
    config: Config,
    metrics: Metrics,
    mut drain: Drain,
) {
    let connections = limits::within_open_files(config.connections, config.other_files);
    let limits = Limits::new(Config { connections, ..config });
    let log = Arc::new(LogLimit::new(LOG_PERIOD));
    let server = |drain: &Drain| Server {
        service: service.clone(),
        config,
        limits: limits.clone(),
        metrics: metrics.clone(),
        log: log.clone(),
        drain: drain.clone(),
    };
    let mut loops = JoinSet::new();
    loop {
        let ended = tokio::select! {
            Some(listener) = listeners.recv() => {
                // What listens may be told to listen again: only the length of its queue changes.
                if let Err(error) = rustix::net::listen(&*listener.socket, BACKLOG) {
                    warn!(%error, "Listener keeps its short queue");
                }
                loops.spawn(server(&drain).accept(listener));
                continue;
            }
            // One that was inside a pod that is gone, or one that panicked.
            Some(ended) = loops.join_next() => ended,
            () = drain.started() => break,
        };
        if failed(ended) {
            return;
        }
    }
    while let Some(ended) = loops.join_next().await {
        if failed(ended) {
            return;
        }
    }
}

/// Whether an accept loop panicked. That ends all: the agent must not go on for one family, or without one pod.
fn failed(ended: Result<(), JoinError>) -> bool {
    ended.inspect_err(|failure| error!(error = %failure, "A listener's task failed")).is_err()
}

/// What every accept loop has.
struct Server<S> {
    service: Arc<S>,
    config: Config,
    limits: Limits,
    metrics: Metrics,
    log: Arc<LogLimit<Trouble>>,
    drain: Drain,
}

/// What is logged of connections, once in a while for each kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Trouble {
    NotAccepted,
    TooMany(Option<Owner>),
    NoPod(Discriminant<Unattested>),
}

// === impl Server ===

impl<S: PodService> Server<S> {
    async fn accept(self, listener: Listener) {
        let mut connections = JoinSet::new();
        let mut drain = self.drain.clone();
        let closed = listener.closed.clone();
        let end = async {
            tokio::select! {
                () = drain.started() => {}
                () = closed.cancelled() => {}
            }
        };
        self.accept_until(end, &listener, &mut connections).await;
        if !drain.is_queue_handed_over() && !closed.is_cancelled() {
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
                        if let Some(left_out) = self.log.admit(Trouble::NotAccepted) {
                            warn!(%error, left_out, "Connection not accepted");
                        }
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
        if !self.limits.has_room() {
            return self.too_many(peer, None);
        }
        let Ok(local) = stream.local_addr() else { return };
        let client = listener.resolver.resolve(&Connection { peer, local });
        let owner = Owner::of(&client);
        let Some(slot) = self.limits.take(owner.clone()) else {
            return self.too_many(peer, Some(owner));
        };
        self.metrics.accepted(client.as_ref().err());
        if client == Err(Unattested::Proof) {
            // That it came is all there is to it.
            return;
        }
        if let Err(error) = &client {
            let kind = Trouble::NoPod(std::mem::discriminant(error));
            if let Some(left_out) = self.log.admit(kind) {
                warn!(pod.ip = %peer.ip(), %error, left_out, "Connection belongs to no pod");
            }
        }
        let served = connection::Served {
            service: self.service.clone(),
            config: self.config,
            metrics: self.metrics.clone(),
            drain: self.drain.clone(),
        };
        connections.spawn(async move {
            served.run(stream, client).await;
            drop(slot);
        });
    }

    /// Counts and tells of a connection that is closed at once: beyond the limit of `owner`, or of all.
    fn too_many(&self, peer: SocketAddr, owner: Option<Owner>) {
        self.metrics.refused();
        if let Some(left_out) = self.log.admit(Trouble::TooMany(owner.clone())) {
            warn!(pod.ip = %peer.ip(), ?owner, left_out, "Too many connections; closed");
        }
    }
}

#[cfg(test)]
mod tests;

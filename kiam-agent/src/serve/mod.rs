//! One accept loop over all listeners: deadlines, connection limits, peer address, drain.
//!
//! Who is calling is resolved once, right after accept; each request is authorised anew.

mod connection;
mod limits;
mod metrics;
mod relay;
mod report;
mod share;

use std::{
    future::Future, io, mem::Discriminant, net::SocketAddr, pin::pin, sync::Arc, time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use rustix::net::{listen, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{JoinError, JoinSet, yield_now},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use self::{
    limits::{ExceededLimit, Limits},
    metrics::Rejection,
    report::Report,
};
pub use self::{
    limits::{Owner, raise_open_files},
    metrics::Metrics,
    relay::Relay,
    share::Rate,
};
use kiam_core::{
    lifecycle::Drain,
    pods::{Client, ClientResolver, Connection, NotFound, Pod, PodUid, Unattested},
    telemetry::LogLimit,
};

/// Connections that may wait to be accepted; tokio's 128 are fewer than a node's pods open at once, and a
/// SYN that finds no place is sent again only after a second. The system may allow fewer (`somaxconn`).
const BACKLOG: i32 = 4096;
/// Bytes that a connection's peer may send ahead of what is read, and be sent ahead of what it reads; the kernel doubles
/// them for its own structures. They are on the agent's account, and the system's defaults let a connection hold 128 kB
/// and more. Heads of requests are up to 16 KiB, but are read as they come; answers are below 4 kB.
const SOCKET_BUFFER: usize = 8 * 1024;
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

    /// What is known of `client` now, for the log.
    fn pod(&self, client: &Client) -> Option<Arc<Pod>>;
}

/// Limits and deadlines of connections.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Open connections in all.
    pub connections: usize,
    /// Open files that are kept for all but connections.
    pub other_files: usize,
    /// Open connections of one pod, or of one address where only that is known; far fewer once half of all are
    /// open. Less than the kernel's quota (`POD_QUOTA`), beyond which a connect is denied: here an idle connection ends for
    /// a new one.
    pub connections_per_pod: usize,
    /// Open connections that are no pod's, together.
    pub connections_of_strangers: usize,
    /// How often one pod may connect; connections beyond that wait in the queue of the listener inside the pod, and are
    /// closed at the node's.
    pub new_connections: Rate,
    /// How often one pod may ask; requests beyond that get 503.
    pub requests: Rate,
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
    /// The pod that it is inside of, whose own queue it has.
    pub pod: Option<PodUid>,
    /// Cancelled when nothing more is to be accepted: the pod that it is inside of is gone.
    pub closed: CancellationToken,
}

// === impl Listener ===

impl Listener {
    /// One of the node, that is there as long as the agent is.
    #[must_use]
    pub fn new(socket: TcpListener, resolver: Arc<dyn ClientResolver>) -> Self {
        let closed = CancellationToken::new();
        Self { socket: Arc::new(socket), resolver, pod: None, closed }
    }

    /// Sets what the sockets that it accepts are to have. One that another agent has made may have something else.
    fn prepare(&self) {
        let socket = &*self.socket;
        let buffers = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER)
            .and_then(|()| sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER));
        if let Err(error) = buffers {
            warn!(%error, "Connections keep the system's buffers, which one pod could fill");
        }
        // What listens may be told to listen again: only the length of its queue changes.
        if let Err(error) = listen(socket, BACKLOG) {
            warn!(%error, "Listener keeps its short queue");
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            connections: 8192,
            other_files: 256,
            connections_per_pod: 192,
            connections_of_strangers: 256,
            new_connections: Rate::POD,
            requests: Rate::POD,
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
    let report = Arc::new(Report::new(service.clone(), metrics.clone()));
    let server = |drain: &Drain| Server {
        service: service.clone(),
        config,
        limits: limits.clone(),
        metrics: metrics.clone(),
        log: log.clone(),
        report: report.clone(),
        drain: drain.clone(),
    };
    let mut loops = JoinSet::new();
    loop {
        let ended = tokio::select! {
            Some(listener) = listeners.recv() => {
                listener.prepare();
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
    log: Arc<LogLimit<LogKind>>,
    report: Arc<Report<S>>,
    drain: Drain,
}

/// What is logged of connections, once in a while for each kind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum LogKind {
    NotAccepted,
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
                accepted = self.next(listener) => match accepted {
                    Ok((stream, peer)) => {
                        self.take(stream, peer, listener, connections);
                        if listener.pod.is_some() {
                            // The queue is the pod's own, and no other's connection is in it.
                            yield_now().await;
                        }
                    }
                    Err(error) => {
                        // Mostly "too many open files": it passes when connections close.
                        if let Some(left_out) = self.log.admit(LogKind::NotAccepted) {
                            warn!(%error, left_out, "Connection not accepted");
                        }
                        sleep(Duration::from_millis(50)).await;
                    }
                },
                Some(ended) = connections.join_next() => {
                    // The connection is lost, and no other. One that was idle may have been ended for another.
                    if let Err(error) = ended && error.is_panic() {
                        error!(%error, "Connection's task failed");
                    }
                }
                () = end.as_mut() => return,
            }
        }
    }

    /// The next connection. One that comes to the listener inside a pod waits until the pod may open another.
    async fn next(&self, listener: &Listener) -> io::Result<(TcpStream, SocketAddr)> {
        if let Some(pod) = &listener.pod {
            self.limits.may_open(&Owner::Pod(pod.clone())).await;
        }
        listener.socket.accept().await
    }

    fn take(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        listener: &Listener,
        connections: &mut JoinSet<()>,
    ) {
        if !self.limits.has_room() {
            return self.refuse(ExceededLimit::All, None, peer);
        }
        // Who has reset it is gone, and its ends may be those of another connection by now, whose entry is not for this one.
        if stream.peer_addr().is_err() {
            return;
        }
        let Ok(local) = stream.local_addr() else { return };
        let client = listener.resolver.resolve(&Connection { peer, local });
        let slot = match self.limits.take(Owner::of(&client)) {
            Ok(slot) => slot,
            Err(beyond) => return self.refuse(beyond, Some(&client), peer),
        };
        if slot.has_replaced() {
            self.report.rejected(Rejection::IdleConnections, Some(&client), peer);
        }
        self.metrics.accepted(client.as_ref().err());
        if client == Err(Unattested::Selftest) {
            // That it came is all there is to it.
            return;
        }
        if let Err(error) = &client {
            let kind = LogKind::NoPod(std::mem::discriminant(error));
            if let Some(left_out) = self.log.admit(kind) {
                warn!(pod.ip = %peer.ip(), %error, left_out, "Connection belongs to no pod");
            }
        }
        let ending = slot.ending();
        let served = connection::ConnectionTask {
            service: self.service.clone(),
            config: self.config,
            metrics: self.metrics.clone(),
            drain: self.drain.clone(),
            report: self.report.clone(),
            slot,
            peer,
        };
        ending.by(connections.spawn(served.run(stream, client)));
    }

    /// A connection that is closed at once.
    fn refuse(
        &self,
        beyond: ExceededLimit,
        client: Option<&Result<Client, Unattested>>,
        peer: SocketAddr,
    ) {
        self.metrics.refused();
        self.report.rejected(beyond.into(), client, peer);
    }
}

#[cfg(test)]
mod tests;

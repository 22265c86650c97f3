//! One accept loop over all listeners: deadlines, connection limits, peer address, drain.
//!
//! The caller is resolved once, right after accept. Each request is authorised separately.

mod config;
mod connection;
mod lanes;
mod limits;
mod metrics;
mod rarely;
mod relay;
mod report;
mod share;

use std::{
    future::Future,
    io,
    mem::Discriminant,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use rustix::net::{listen, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::mpsc,
    task::{JoinError, JoinSet, yield_now},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, warn};

pub use self::{
    config::Config,
    limits::{Owner, open_files, raise_open_files},
    metrics::Metrics,
    relay::Relay,
};
use self::{
    limits::{ExceededLimit, Limits},
    metrics::Rejection,
    report::Report,
};
use kiam_core::{
    lifecycle::Drain,
    pods::{Client, ClientResolver, Connection, NotFound, Pod, PodUid, Unattested},
    rate::Rate,
    telemetry::LogLimit,
};

/// The backlog of a listener. Tokio's 128 are fewer than a node's pods open at once, and a dropped SYN is sent again only
/// after a second. The system may allow fewer (`somaxconn`).
const BACKLOG: i32 = 4096;
/// The size of a connection's socket buffers, which the kernel doubles for its own structures. They count against the
/// agent's memory, and the system's defaults allow 128 kB and more per connection. Heads of requests are up to 16 KiB, but
/// are read as they come. Answers are below 4 kB.
const SOCKET_BUFFER: usize = 8 * 1024;
/// The default rate of one pod. A busy pod's SDKs make a few requests an hour, and a client that creates a session for each
/// call makes three for it.
pub const POD_RATE: Rate = Rate { burst: 1000, period: Duration::from_millis(5) };
/// How many tasks a worker of the runtime runs before it looks at sockets. While owners keep all workers busy, whoever sends
/// or connects is seen after as many turns.
pub const EVENT_INTERVAL: u32 = 8;
/// The shortest time between two equal log lines.
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// A service that answers pods' requests. `imds` implements it.
pub trait PodService: Send + Sync + 'static {
    /// What the service remembers of one connection, between its requests.
    type Session: Default + Send + Sync;

    /// The relay for the connection of `client`, before a byte of it is read; `None` to serve it.
    ///
    /// # Errors
    ///
    /// [`NotFound`] if the pod is not certain. The connection is then called once with [`Unattested::Unknown`], and closed.
    fn relay(
        &self,
        client: &Client,
    ) -> impl Future<Output = Result<Option<Relay>, NotFound>> + Send;

    /// Answers one request of `client`, which was resolved when it connected. The request `began` now.
    fn call(
        &self,
        client: &Result<Client, Unattested>,
        session: &Self::Session,
        request: Request<Incoming>,
        began: Instant,
    ) -> impl Future<Output = Response<Full<Bytes>>> + Send;

    /// The pod of `client`, if it is known, for the log.
    fn pod(&self, client: &Client) -> Option<Arc<Pod>>;
}

/// A listening socket, with the resolver of its callers.
pub struct Listener {
    /// The listening socket.
    pub socket: Arc<TcpListener>,
    /// The resolver of its callers.
    pub resolver: Arc<dyn ClientResolver>,
    /// The pod of a pod listener, which has a queue of its own.
    pub pod: Option<PodUid>,
    /// Whether the next agent, if one takes over, has this socket too. It has not where a pod came after it got its sockets.
    pub passed: Arc<AtomicBool>,
    /// Cancelled when a pod listener's pod is gone.
    pub closed: CancellationToken,
}

// === impl Listener ===

impl Listener {
    /// A node listener, which exists as long as the agent.
    #[must_use]
    pub fn new(socket: TcpListener, resolver: Arc<dyn ClientResolver>) -> Self {
        let (passed, closed) = (Arc::new(AtomicBool::new(true)), CancellationToken::new());
        Self { socket: Arc::new(socket), resolver, pod: None, passed, closed }
    }

    /// Sets the options that accepted sockets inherit, since another agent may have created the socket, and each connection
    /// is spared the system calls.
    fn prepare(&self, config: &Config) {
        let socket = &*self.socket;
        // A failure only costs a delay.
        let _ = sockopt::set_tcp_nodelay(socket, true);
        // A client that never reads would otherwise hold its slot until it counts as idle: see TCP_USER_TIMEOUT in tcp(7).
        let unread = u32::try_from(config.unread_deadline.as_millis()).unwrap_or(u32::MAX);
        if let Err(error) = sockopt::set_tcp_user_timeout(socket, unread) {
            warn!(%error, "Setting TCP_USER_TIMEOUT on a listener failed; clients that never read end when idle");
        }
        let buffers = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER)
            .and_then(|()| sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER));
        if let Err(error) = buffers {
            warn!(%error, "Setting the socket buffers of a listener failed; connections use the system's larger ones");
        }
        // listen(2) on a listening socket only changes the length of its queue.
        if let Err(error) = listen(socket, BACKLOG) {
            warn!(%error, "Setting the backlog of a listener failed");
        }
    }
}

/// Serves all `listeners` until the drain begins, and then finishes begun requests.
pub async fn run<S: PodService>(
    mut listeners: mpsc::Receiver<Listener>,
    service: Arc<S>,
    config: Config,
    metrics: Metrics,
    drain: Drain,
) {
    let connections = limits::within_open_files(config.connections, config.other_files);
    let limits = Limits::new(Config { connections, ..config }, lanes());
    let log = Arc::new(LogLimit::new(LOG_PERIOD));
    let report = Arc::new(Report::new(service.clone(), metrics.clone()));
    let server = || Server {
        service: service.clone(),
        config,
        limits: limits.clone(),
        metrics: metrics.clone(),
        log: log.clone(),
        report: report.clone(),
        drain: drain.clone(),
        connections: TaskTracker::new(),
        end: CancellationToken::new(),
    };
    let mut loops = JoinSet::new();
    let begin = |listener: Listener, loops: &mut JoinSet<()>| {
        listener.prepare(&config);
        loops.spawn(server().accept(listener));
    };
    let mut draining = drain.clone();
    loop {
        let ended = tokio::select! {
            Some(listener) = listeners.recv() => {
                begin(listener, &mut loops);
                continue;
            }
            // A pod listener whose pod is gone, or a loop that panicked.
            Some(ended) = loops.join_next() => ended,
            () = draining.started() => break,
        };
        if failed(ended) {
            return;
        }
    }
    // Pods may connect to what was sent before this.
    listeners.close();
    while let Some(listener) = listeners.recv().await {
        begin(listener, &mut loops);
    }
    while let Some(ended) = loops.join_next().await {
        if failed(ended) {
            return;
        }
    }
}

/// The most lanes of an owner: four for each thread that runs tasks, so that a thread that the kernel stops in one lane
/// leaves three to the others.
fn lanes() -> usize {
    4 * Handle::current().metrics().num_workers()
}

/// Whether an accept loop panicked. That ends all loops: the agent must not go on without one family or one pod.
fn failed(ended: Result<(), JoinError>) -> bool {
    ended.inspect_err(|failure| error!(error = %failure, "A listener's task failed")).is_err()
}

/// The state of one accept loop.
struct Server<S> {
    service: Arc<S>,
    config: Config,
    limits: Limits,
    metrics: Metrics,
    log: Arc<LogLimit<LogKind>>,
    report: Arc<Report<S>>,
    drain: Drain,
    connections: TaskTracker,
    /// Cancelled when the loop ends, with all that is still open.
    end: CancellationToken,
}

/// A kind of log lines about connections, for the limit of equal lines.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum LogKind {
    NotAccepted,
    NoPod(Discriminant<Unattested>),
}

// === impl Server ===

impl<S: PodService> Server<S> {
    async fn accept(self, listener: Listener) {
        let _end = self.end.clone().drop_guard();
        let mut drain = self.drain.clone();
        let closed = listener.closed.clone();
        let end = async {
            tokio::select! {
                () = drain.started() => {}
                () = closed.cancelled() => {}
            }
        };
        self.accept_until(end, &listener).await;
        let continued = drain.is_queue_handed_over() && listener.passed.load(Ordering::Relaxed);
        if !continued && !closed.is_cancelled() {
            let late = sleep(self.config.late_accepts);
            self.accept_until(late, &listener).await;
        }
        drop(listener);
        self.connections.close();
        if timeout(self.config.drain_deadline, self.connections.wait()).await.is_err() {
            warn!("Connections were still open at the end of the drain");
        }
    }

    async fn accept_until(&self, end: impl Future<Output = ()>, listener: &Listener) {
        let mut end = pin!(end);
        loop {
            tokio::select! {
                accepted = self.next(listener) => match accepted {
                    Ok((stream, peer)) => {
                        self.take(stream, peer, listener);
                        if listener.pod.is_some() {
                            // The queue is the pod's own, so other pods come first.
                            yield_now().await;
                        }
                    }
                    Err(error) => {
                        // Mostly "too many open files": it passes when connections close.
                        if let Some(left_out) = self.log.admit(LogKind::NotAccepted) {
                            warn!(%error, left_out, "Accepting a connection failed");
                        }
                        sleep(Duration::from_millis(50)).await;
                    }
                },
                () = end.as_mut() => return,
            }
        }
    }

    /// Accepts the next connection. At a pod listener it first waits until the pod may open another.
    async fn next(&self, listener: &Listener) -> io::Result<(TcpStream, SocketAddr)> {
        if let Some(pod) = &listener.pod {
            self.limits.may_open(&Owner::Pod(pod.clone())).await;
        }
        listener.socket.accept().await
    }

    fn take(&self, stream: TcpStream, peer: SocketAddr, listener: &Listener) {
        if !self.limits.has_room() {
            return self.reject(ExceededLimit::All, None, peer);
        }
        // A connection that was reset may have the same ends as another one by now, whose entry is not for this one.
        if stream.peer_addr().is_err() {
            return;
        }
        let Ok(local) = stream.local_addr() else { return };
        let client = listener.resolver.resolve(&Connection { peer, local });
        let slot = match self.limits.take(Owner::of(&client), &self.end) {
            Ok(slot) => slot,
            Err(limit) => return self.reject(limit, Some(&client), peer),
        };
        if slot.has_replaced() {
            self.report.rejected(Rejection::IdleConnections, Some(&client), peer);
        }
        self.metrics.accepted(client.as_ref().err());
        if client == Err(Unattested::Selftest) {
            // The witness has seen it, which is all the self-test needs.
            return;
        }
        if let Err(error) = &client {
            let kind = LogKind::NoPod(std::mem::discriminant(error));
            if let Some(left_out) = self.log.admit(kind) {
                warn!(pod.ip = %peer.ip(), %error, left_out, "Connection of no known pod");
            }
        }
        let share = slot.share().clone();
        let task = connection::ConnectionTask {
            service: self.service.clone(),
            config: self.config,
            metrics: self.metrics.clone(),
            drain: self.drain.clone(),
            report: self.report.clone(),
            slot,
            peer,
        };
        share.lanes().spawn(self.connections.track_future(task.run(stream, client)));
    }

    /// Closes a connection that exceeds a limit.
    fn reject(
        &self,
        limit: ExceededLimit,
        client: Option<&Result<Client, Unattested>>,
        peer: SocketAddr,
    ) {
        self.metrics.over_limit();
        self.report.rejected(limit.into(), client, peer);
    }
}

#[cfg(test)]
mod tests;

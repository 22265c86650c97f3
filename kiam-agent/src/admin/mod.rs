//! Speaks HTTP to operators.
//!
//! Over TCP there are only `/live`, `/ready` and `/metrics`, without names of pods or roles, which everybody on the node
//! may see. `/status`, `/pods`, `/explain`, `/refresh` and `/log-level` are on a Unix socket that only root can open.

mod client;
mod command;
mod connections;
mod metrics;
mod node_status;
mod operations;
mod operators;
mod refresh;
mod routes;
mod unix;

use std::{
    convert::Infallible,
    hash::Hash,
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    time::{sleep, timeout},
};

use self::connections::{CONNECTIONS, ConnectionGuard, Connections, PeerSource, SHARE};
pub(crate) use self::routes::ascii;
pub use self::{
    client::{StatusError, get, post},
    command::{Output, StatusForm, explain, pods, refresh, status, wait_for},
    metrics::register_metrics,
    node_status::{
        CredentialCounts, FailingRole, LoggedWarning, NodeStatus, StatusSettings, StatusSources,
        span,
    },
    operators::Operators,
    refresh::PodRefresher,
    unix::{OwnSocket, SOCKET, bind_unix, is_served},
};
use crate::explain::Explanation;
use kiam_core::lifecycle::{Drain, Readiness};

/// The deadline of a request's head, which comes in one piece over the node's own network.
const HEADER_DEADLINE: Duration = Duration::from_secs(2);
/// The longest life of a connection, for clients that read nothing.
const DEADLINE: Duration = Duration::from_secs(30);

/// The operations for operators.
pub struct Operations {
    /// The conditions for being ready.
    pub readiness: Readiness,
    /// `/status`: the state of this agent.
    pub status: Box<dyn Fn() -> NodeStatus + Send + Sync>,
    /// Every metric, once all of them are registered.
    pub registry: Arc<OnceLock<Registry>>,
    /// `/pods`: the state of each pod as JSON, without secrets.
    pub pods: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// `/explain/<namespace>/<pod>`: the answer that the pod gets, and why.
    pub explain: Explain,
    /// `POST /refresh/<namespace>/<pod>`: requests the pod's credentials from STS now.
    pub refresh: Refresh,
    /// `/log-level`: the filter in force.
    pub log_level: Box<dyn Fn() -> String + Send + Sync>,
    /// `PUT /log-level`: sets the level, or returns why not.
    pub set_log_level: SetLogLevel,
}

/// Explains the pod of this namespace and name, without secrets.
pub type Explain = Box<dyn Fn(&str, &str) -> Explanation + Send + Sync>;

/// Requests the credentials of the pod of this namespace and name from STS, and returns the result: `Ok` if they were
/// issued.
pub type Refresh =
    Box<dyn Fn(&str, &str) -> BoxFuture<'static, Result<String, String>> + Send + Sync>;

/// Sets the log level by its name, or returns why not.
pub type SetLogLevel = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// The paths that a listener serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// `/metrics` alone.
    Metrics,
    /// `/live`, `/ready`, `/metrics`.
    Status,
    /// All paths.
    Everything,
}

/// Serves one TCP listener until the drain begins.
pub async fn serve_tcp(
    listener: TcpListener,
    surface: Surface,
    operations: Arc<Operations>,
    mut drain: Drain,
) {
    let connections = Connections::new(SHARE);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let guard = connections.admit(PeerSource::from(peer.ip()));
                    spawn(stream, surface, &operations, (&connections, guard));
                }
                Err(_) => sleep(Duration::from_millis(50)).await,
            },
            () = drain.started() => return,
        }
    }
}

/// Serves the Unix socket until the drain begins. Only root can open it, so that all connections are one source.
pub async fn serve_unix(listener: UnixListener, operations: Arc<Operations>, mut drain: Drain) {
    let connections = Connections::new(CONNECTIONS);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let guard = connections.admit(());
                    spawn(stream, Surface::Everything, &operations, (&connections, guard));
                }
                Err(_) => sleep(Duration::from_millis(50)).await,
            },
            () = drain.started() => return,
        }
    }
}

fn spawn<S: Copy + Eq + Hash + Send + 'static>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    surface: Surface,
    operations: &Arc<Operations>,
    (connections, guard): (&Connections<S>, ConnectionGuard<S>),
) {
    let operations = operations.clone();
    let accepted = guard.accepted();
    // The task ends with the connection, at the deadline, or for another connection.
    let task = tokio::spawn(async move {
        let answer = service_fn(|request| {
            guard.asks();
            let operations = operations.clone();
            async move { Ok::<_, Infallible>(routes::answer(&operations, surface, request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_DEADLINE)
            .serve_connection(TokioIo::new(stream), answer);
        // Errors of the client's connection are not the agent's.
        let _ = timeout(DEADLINE, connection).await;
    });
    connections.served_by(accepted, task.abort_handle());
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpSocket, TcpStream, UnixStream},
        time::Instant,
    };

    use super::*;
    use kiam_core::lifecycle::{DrainSignal, drain};

    fn operations() -> Arc<Operations> {
        Arc::new(Operations {
            readiness: Readiness::default(),
            status: Box::new(NodeStatus::default),
            registry: Arc::default(),
            pods: Box::new(|| serde_json::json!([])),
            explain: Box::new(|_, _| Explanation::default()),
            refresh: Box::new(|_, _| Box::pin(async { Err(String::new()) })),
            log_level: Box::new(String::new),
            set_log_level: Box::new(|_| Ok(())),
        })
    }

    async fn served() -> (SocketAddr, DrainSignal) {
        let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (signal, drain) = drain();
        tokio::spawn(serve_tcp(listener, Surface::Status, operations(), drain));
        (SocketAddr::from((Ipv4Addr::LOCALHOST, port)), signal)
    }

    /// A scrape, which is to be answered within a second whatever others do.
    async fn assert_answered(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
        let exchange = async {
            stream.write_all(b"GET /live HTTP/1.0\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = timeout(Duration::from_secs(1), exchange).await.expect("it is answered");
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer:?}");
    }

    #[tokio::test]
    async fn a_scrape_is_answered_whatever_number_of_idle_connections_one_source_holds() {
        let (address, _signal) = served().await;
        let mut held = Vec::new();
        for number in 0..3 * CONNECTIONS {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // Some have asked before, and some have begun to.
            let begun = ["", "GET /live HTTP/1.1\r\n", "GET /live HTTP/1.1\r\nhost: a\r\n\r\n"];
            let begun = begun[number % begun.len()].as_bytes();
            let _ = stream.write_all(begun).await;
            held.push(stream);
        }
        assert_answered(TcpStream::connect(address).await.unwrap()).await;
    }

    #[tokio::test]
    async fn all_addresses_of_the_loopback_have_one_share_together() {
        let (address, _signal) = served().await;
        let mut held = Vec::new();
        for last in (2..=u8::MAX).take(SHARE) {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::new(127, 1, 2, last), 0).into()).unwrap();
            held.push(socket.connect(address).await.unwrap());
        }
        assert_answered(TcpStream::connect(address).await.unwrap()).await;
        let ended = timeout(Duration::from_secs(1), held[0].read(&mut [0])).await;
        assert!(matches!(ended, Ok(Ok(0) | Err(_))), "the first ends for the last: {ended:?}");
    }

    #[tokio::test]
    async fn a_connection_that_asks_for_nothing_ends_soon() {
        let (address, _signal) = served().await;
        let mut idle = TcpStream::connect(address).await.unwrap();
        let began = Instant::now();
        let ended = timeout(2 * HEADER_DEADLINE, idle.read(&mut [0])).await;
        ended.expect("it ends").ok();
        assert!(began.elapsed() >= HEADER_DEADLINE / 2);
    }

    #[tokio::test]
    async fn a_probe_is_answered_whatever_number_of_idle_connections_root_holds() {
        let state = tempfile::tempdir().unwrap();
        let (listener, own) = bind_unix(state.path()).unwrap();
        own.link().unwrap();
        let (_signal, drain) = drain();
        tokio::spawn(serve_unix(listener, operations(), drain));
        let path = state.path().join(SOCKET);
        let mut held = Vec::new();
        for _ in 0..2 * CONNECTIONS {
            held.push(UnixStream::connect(&path).await.unwrap());
        }
        assert_answered(UnixStream::connect(&path).await.unwrap()).await;
    }
}

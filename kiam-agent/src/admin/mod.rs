//! Speaks HTTP to operators.
//!
//! Over TCP only what may be seen by everybody on the node: `/live`, `/ready`, `/metrics`, without pod or
//! role names. `/pods`, `/explain` and `/log-level` are on a Unix socket that only root can open.

mod client;
mod routes;
mod unix;

use std::{
    convert::Infallible,
    sync::{Arc, OnceLock},
    time::Duration,
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    time::{sleep, timeout},
};

pub use self::{
    client::{StatusError, get},
    unix::{OwnSocket, SOCKET, bind_unix},
};
use crate::lifecycle::{Drain, Readiness};

const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// How long a connection may last in all; who reads nothing would keep it for ever.
const DEADLINE: Duration = Duration::from_secs(30);
/// Connections to one TCP listener at once. Pods in the node's network can open any number, and each takes memory
/// and an open file from the agent.
const CONNECTIONS: usize = 64;

/// What operators may see and change.
pub struct Operations {
    /// What the agent waits for.
    pub readiness: Readiness,
    /// Every metric, once all of them are registered.
    pub registry: Arc<OnceLock<Registry>>,
    /// `/pods`: JSON of what is known about each pod; no secrets.
    pub pods: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// `/explain/<namespace>/<pod>`: what the pod gets, and why.
    pub explain: Explain,
    /// `/log-level`: the filter in force.
    pub log_level: Box<dyn Fn() -> String + Send + Sync>,
    /// `PUT /log-level`: a new level, or why not.
    pub set_log_level: SetLogLevel,
}

/// Explains the pod of this namespace and name: `Ok` if it would get credentials, `Err` if not; no secrets.
pub type Explain = Box<dyn Fn(&str, &str) -> Result<String, String> + Send + Sync>;

/// Sets the log level by its name, or says why not.
pub type SetLogLevel = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// How much a listener shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// `/metrics` alone.
    Metrics,
    /// `/live`, `/ready`, `/metrics`.
    Status,
    /// All of it.
    Everything,
}

/// Serves one TCP listener until the drain begins.
pub async fn serve_tcp(
    listener: TcpListener,
    surface: Surface,
    operations: Arc<Operations>,
    mut drain: Drain,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let next = async || {
        let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        listener.accept().await.map(|(stream, _)| (stream, slot))
    };
    loop {
        tokio::select! {
            accepted = next() => match accepted {
                Ok((stream, slot)) => spawn(stream, surface, &operations, slot),
                Err(_) => sleep(Duration::from_millis(50)).await,
            },
            () = drain.started() => return,
        }
    }
}

/// Serves the Unix socket until the drain begins.
pub async fn serve_unix(listener: UnixListener, operations: Arc<Operations>, mut drain: Drain) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => spawn(stream, Surface::Everything, &operations, ()),
                Err(_) => sleep(Duration::from_millis(50)).await,
            },
            () = drain.started() => return,
        }
    }
}

fn spawn(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    surface: Surface,
    operations: &Arc<Operations>,
    slot: impl Send + 'static,
) {
    let operations = operations.clone();
    // Ends by itself: with the other end's close, or at the deadline.
    tokio::spawn(async move {
        let answer = service_fn(|request| {
            let operations = operations.clone();
            async move { Ok::<_, Infallible>(routes::answer(&operations, surface, request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_DEADLINE)
            .serve_connection(TokioIo::new(stream), answer);
        // The other end's errors are its own.
        let _ = timeout(DEADLINE, connection).await;
        drop(slot);
    });
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;
    use crate::lifecycle::drain;

    #[tokio::test]
    async fn connections_beyond_the_limit_wait_until_others_close() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let operations = Arc::new(Operations {
            readiness: Readiness::default(),
            registry: Arc::default(),
            pods: Box::new(|| serde_json::json!([])),
            explain: Box::new(|_, _| Err(String::new())),
            log_level: Box::new(String::new),
            set_log_level: Box::new(|_| Ok(())),
        });
        let (_signal, drain) = drain();
        tokio::spawn(serve_tcp(listener, Surface::Status, operations, drain));
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS {
            held.push(TcpStream::connect(address).await.unwrap());
        }
        let mut last = TcpStream::connect(address).await.unwrap();
        last.write_all(b"GET /live HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let early = timeout(Duration::from_millis(300), last.read_to_string(&mut answer)).await;
        assert!(early.is_err(), "{answer:?}");
        drop(held.pop());
        last.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer:?}");
    }
}

//! The client of `kiam-agent status`, `explain`, `pods` and `refresh`, which talks to the running agent over its Unix socket.

use std::{io, path::Path, time::Duration};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use super::{SOCKET, unix};

const DEADLINE: Duration = Duration::from_secs(5);
/// The deadline of requests that wait for AWS.
const LONG_DEADLINE: Duration = Duration::from_secs(25);

/// Why a request to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// No agent listens.
    #[error("no agent answers at {socket}: {source}")]
    Connect {
        /// The socket.
        socket: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the agent broke: {0}")]
    Http(#[from] hyper::Error),
    /// The system gives no runtime.
    #[error("can't ask the agent: {0}")]
    Runtime(#[source] io::Error),
    /// The agent did not answer in time.
    #[error("the agent did not answer within {0:?}")]
    Deadline(Duration),
}

/// Gets the status and body of `path`, which must be a valid path, from the agent with this `state_dir`.
///
/// # Errors
///
/// [`StatusError`].
pub async fn get(state_dir: &Path, path: &str) -> Result<(StatusCode, String), StatusError> {
    ask(state_dir, Method::GET, path, DEADLINE).await
}

/// As [`get`], by POST, for requests that may wait for AWS.
///
/// # Errors
///
/// [`StatusError`].
pub async fn post(state_dir: &Path, path: &str) -> Result<(StatusCode, String), StatusError> {
    ask(state_dir, Method::POST, path, LONG_DEADLINE).await
}

async fn ask(
    state_dir: &Path,
    method: Method,
    path: &str,
    deadline: Duration,
) -> Result<(StatusCode, String), StatusError> {
    let asked = timeout(deadline, exchange(state_dir, method, path)).await;
    asked.unwrap_or(Err(StatusError::Deadline(deadline)))
}

async fn exchange(
    state_dir: &Path,
    method: Method,
    path: &str,
) -> Result<(StatusCode, String), StatusError> {
    let failed = |source| {
        let socket = state_dir.join(SOCKET).display().to_string();
        StatusError::Connect { socket, source }
    };
    let stream = unix::connect(state_dir).await.map_err(failed)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "kiam-agent")
        .body(Empty::<Bytes>::new())
        .expect("a path makes a request");
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::select! {
        answered = exchange => answered,
        // Ends first only when it broke.
        Err(error) = connection => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        admin::{NodeStatus, Operations, bind_unix, serve_unix},
        explain::Explanation,
    };
    use kiam_core::lifecycle::{Readiness, drain};

    #[tokio::test]
    async fn operator_sees_what_is_pending_over_the_socket() {
        let state = tempfile::tempdir().unwrap();
        let (listener, own) = bind_unix(state.path()).unwrap();
        own.link().unwrap();
        let readiness = Readiness::default();
        let latch = readiness.latch("pods synced");
        let operations = Arc::new(Operations {
            readiness,
            registry: Arc::default(),
            pods: Box::new(|| serde_json::json!([{ "name": "a" }])),
            status: Box::new(NodeStatus::default),
            explain: Box::new(|namespace, name| {
                let served = name == "a";
                let text = if served { format!("{namespace} {name}\n") } else { "no\n".to_owned() };
                Explanation { served, text, pods: Vec::new() }
            }),
            refresh: Box::new(|namespace, name| {
                let came = format!("{namespace} {name} asked\n");
                let came = if name == "a" { Ok(came) } else { Err(came) };
                Box::pin(async { came })
            }),
            log_level: Box::new(|| "info".to_owned()),
            set_log_level: Box::new(|_| Ok(())),
        });
        let (signal, drain) = drain();
        let task = tokio::spawn(serve_unix(listener, operations, drain));
        let (status, body) = get(state.path(), "/ready").await.unwrap();
        assert_eq!((status.as_u16(), body.as_str()), (503, "pending: pods synced\n"));
        latch.set();
        assert_eq!(get(state.path(), "/ready").await.unwrap().0, StatusCode::OK);
        let (_, pods) = get(state.path(), "/pods").await.unwrap();
        assert!(pods.contains("\"name\": \"a\""), "{pods}");
        let (status, text) = get(state.path(), "/explain/shop/a").await.unwrap();
        assert_eq!((status, text.as_str()), (StatusCode::OK, "shop a\n"));
        let (status, text) = get(state.path(), "/explain/shop/b").await.unwrap();
        assert_eq!((status, text.as_str()), (StatusCode::FORBIDDEN, "no\n"));
        let (status, text) = get(state.path(), "/explain/shop/b?output=json").await.unwrap();
        let read: Explanation = serde_json::from_str(&text).unwrap();
        assert_eq!((status, read.text.as_str()), (StatusCode::FORBIDDEN, "no\n"));
        let (_, status) = get(state.path(), "/status").await.unwrap();
        assert_eq!(serde_json::from_str::<NodeStatus>(&status).unwrap(), NodeStatus::default());
        for path in ["/explain", "/explain/shop", "/explain/shop/a/b"] {
            assert_eq!(get(state.path(), path).await.unwrap().0, StatusCode::NOT_FOUND, "{path}");
        }
        for (pod, status) in [("a", 200), ("b", 502)] {
            let came = post(state.path(), &format!("/refresh/shop/{pod}")).await.unwrap();
            assert_eq!((came.0.as_u16(), came.1), (status, format!("shop {pod} asked\n")));
        }
        // Looking changes nothing.
        assert_eq!(get(state.path(), "/refresh/shop/a").await.unwrap().0, StatusCode::NOT_FOUND);
        assert_eq!(get(state.path(), "/nothing").await.unwrap().0, StatusCode::NOT_FOUND);
        signal.start();
        task.await.unwrap();
        assert!(matches!(get(state.path(), "/live").await, Err(StatusError::Connect { .. })));
    }
}

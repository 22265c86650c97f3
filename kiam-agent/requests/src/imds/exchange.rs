//! One request to the real IMDS, on a connection of its own.

use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::upstream::{UpstreamError, UpstreamUrl};
use kiam_core::secret::Secret;

/// The largest answer. User data, which is never requested, may have 16 KiB.
pub(super) const MAX_BODY: usize = 64 * 1024;

/// A connection to the service at `url`.
pub(super) async fn connect(url: &UpstreamUrl) -> Result<TcpStream, UpstreamError> {
    let (host, port) = url.socket();
    let connected = TcpStream::connect((host, port)).await;
    connected.map_err(|source| UpstreamError::Connect { url: url.clone(), source })
}

/// The session token in the body of an answer, which a header can hold.
pub(super) fn session_token(body: &Bytes) -> Result<Secret, UpstreamError> {
    let text = std::str::from_utf8(body).map_err(|_| UpstreamError::Body)?;
    let visible = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    visible.then(|| Secret::new(text.to_owned())).ok_or(UpstreamError::Body)
}

/// Makes the one request of the connection `stream`, with `header` if there is one.
pub(super) async fn exchange(
    stream: TcpStream,
    url: &UpstreamUrl,
    method: Method,
    path: &str,
    header: Option<(&'static str, &str)>,
) -> Result<Response<Bytes>, UpstreamError> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut request = Request::builder()
        .method(method)
        .uri(format!("/latest/{path}"))
        .header(header::HOST, url.to_string().trim_start_matches("http://"))
        .header(header::CONNECTION, "close");
    if let Some((name, value)) = header {
        request = request.header(name, value);
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .expect("normalised paths and visible values make a request");
    let exchange = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await;
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => UpstreamError::Http(*error),
            Err(other) => {
                debug_assert!(other.is::<LengthLimitError>());
                UpstreamError::Body
            }
        })?;
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    tokio::select! {
        answer = exchange => answer,
        // Ends first only when it broke.
        Err(error) = connection => Err(error.into()),
    }
}

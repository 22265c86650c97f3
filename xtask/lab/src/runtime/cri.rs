//! A client of the Container Runtime Interface: gRPC calls with one message each way, over the runtime's Unix socket.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request, StatusCode};
use prost::Message;
use tokio::{
    net::UnixStream,
    runtime::{Builder, Runtime},
    time::timeout,
};

/// How long a call may take: the kubelet's own limit is 2 minutes, and its nodes are faster.
const LIMIT: Duration = Duration::from_secs(240);
/// What comes before each message: whether it is compressed, and its length in 4 bytes, big-endian.
const PREFIX: usize = 5;

/// A connection. It makes one call at a time, as its methods block.
#[derive(Debug)]
pub(super) struct Cri {
    sender: SendRequest<Bytes>,
    /// Runs the connection, while there is a call.
    tasks: Runtime,
}

// === impl Cri ===

impl Cri {
    /// Connects to the runtime that listens at `socket`.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let tasks = Builder::new_current_thread().enable_all().build();
        let tasks = tasks.context("making an async runtime")?;
        let sender = tasks.block_on(async { timeout(LIMIT, connect(socket)).await });
        Ok(Self { sender: sender.context("connecting to the runtime takes too long")??, tasks })
    }

    /// Calls `method` of the RuntimeService.
    pub(super) fn call<A: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<A> {
        let call = async { timeout(LIMIT, call(self.sender.clone(), method, request)).await };
        let answer = self.tasks.block_on(call);
        let answer = answer.with_context(|| format!("{method} takes longer than {LIMIT:?}"))?;
        answer.with_context(|| format!("calling {method}"))
    }
}

async fn connect(socket: &Path) -> Result<SendRequest<Bytes>> {
    let stream = UnixStream::connect(socket).await;
    let stream = stream.with_context(|| format!("connecting to {}", socket.display()))?;
    let (sender, connection) = h2::client::handshake(stream).await.context("beginning HTTP/2")?;
    // Its end is told by the calls.
    tokio::spawn(connection);
    Ok(sender)
}

async fn call<A: Message + Default>(
    sender: SendRequest<Bytes>,
    method: &str,
    request: &impl Message,
) -> Result<A> {
    let head = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .context("naming the method")?;
    let (answer, mut body) = sender.ready().await?.send_request(head, false)?;
    body.send_data(framed(request)?, true)?;
    let (head, mut body) = answer.await?.into_parts();
    if head.status != StatusCode::OK {
        bail!("HTTP status {}", head.status);
    }
    let mut bytes = BytesMut::new();
    while let Some(part) = body.data().await {
        let part = part?;
        body.flow_control().release_capacity(part.len())?;
        bytes.extend_from_slice(&part);
    }
    // An answer that has no message has the status in its only head.
    succeeded(&body.trailers().await?.unwrap_or(head.headers))?;
    let message = bytes.get(PREFIX..).context("the answer is cut off")?;
    A::decode(message).context("reading the answer")
}

fn framed(message: &impl Message) -> Result<Bytes> {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).context("the message is too long")?);
    message.encode(&mut bytes).context("writing the message")?;
    Ok(bytes.freeze())
}

fn succeeded(trailers: &HeaderMap) -> Result<()> {
    let text = |name| trailers.get(name).and_then(|value| value.to_str().ok());
    match text("grpc-status") {
        Some("0") => Ok(()),
        Some(status) => bail!("gRPC status {status}: {}", text("grpc-message").unwrap_or_default()),
        None => bail!("an answer without a gRPC status"),
    }
}

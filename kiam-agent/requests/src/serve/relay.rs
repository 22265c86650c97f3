//! Passes a connection's bytes on without reading them.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::debug;

use super::{Config, metrics::RelayOutcome};
use kiam_core::lifecycle::Drain;

/// The buffer of one direction.
const BUFFER: usize = 8 * 1024;
/// The idle time after which a connection ends once the drain has begun.
const PAUSE: Duration = Duration::from_secs(1);

/// The destination of connections that are passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relay {
    /// The host's name or address.
    pub host: String,
    /// The port.
    pub port: u16,
}

// === impl Relay ===

impl Relay {
    /// Passes `stream` on, both ways, on a connection of its own, and returns the outcome.
    pub(super) async fn run(
        &self,
        mut stream: TcpStream,
        config: &Config,
        mut drain: Drain,
    ) -> RelayOutcome {
        let connect = TcpStream::connect((self.host.as_str(), self.port));
        let mut other = match timeout(config.relay_connect, connect).await {
            Ok(Ok(other)) => other,
            failed => {
                debug!(
                    ?failed,
                    host = self.host,
                    "Connecting to the host to pass a connection on to failed"
                );
                return RelayOutcome::Unreachable;
            }
        };
        // A failure only costs a delay.
        let _ = other.set_nodelay(true);
        let moved = Notify::new();
        let (mut from_pod, mut to_pod) = stream.split();
        let (mut from_other, mut to_other) = other.split();
        let both = async {
            tokio::try_join!(
                copy(&mut from_pod, &mut to_other, &moved),
                copy(&mut from_other, &mut to_pod, &moved),
            )
        };
        let idle = async {
            let idle = async |limit| while timeout(limit, moved.notified()).await.is_ok() {};
            tokio::select! {
                () = idle(config.relay_idle) => RelayOutcome::Idle,
                () = drain.started() => {
                    idle(PAUSE.min(config.relay_idle)).await;
                    RelayOutcome::Drained
                }
            }
        };
        tokio::select! {
            ended = both => if ended.is_ok() { RelayOutcome::Closed } else { RelayOutcome::Broken },
            how = idle => how,
            () = sleep(config.relay_total) => RelayOutcome::Overtime,
        }
    }
}

/// Copies bytes until the end of the stream, which is passed on too.
async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    moved: &Notify,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        moved.notify_one();
    }
}

//! The starting agent's side of a handover.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    time::Duration,
};

use rustix::net::sockopt;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::{sleep, timeout},
};
use tracing::{debug, warn};
use zeroize::Zeroizing;

use super::{Peers, SOCKET, check, gone, message, sealed};

/// The deadline of an agent's answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);
/// Attempts to reach an agent: a superseded one closes the connection, and soon its successor listens.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);
/// Failed requests after which an agent counts as hung.
const PRESENCE_ATTEMPTS: u32 = 3;

/// The result of a request for sockets.
#[derive(Debug)]
pub enum HandoverAnswer {
    /// No agent runs.
    Nobody,
    /// An agent runs but sends no sockets, for this reason: it hangs, or rejects the request.
    Silent(String),
    /// The agent sent its sockets.
    Sockets(Handover),
}

/// The sockets of the running agent, which serves until [`Handover::taken`].
#[derive(Debug)]
pub struct Handover {
    stream: UnixStream,
    sockets: Vec<TcpListener>,
}

/// The descriptor as a listener; `None` if it is not a listening TCP socket.
fn listener(given: OwnedFd) -> Option<TcpListener> {
    if !sockopt::socket_acceptconn(&given).unwrap_or_default() {
        return None;
    }
    let listener = TcpListener::from(given);
    listener.local_addr().is_ok().then_some(listener)
}

// === impl Peers ===

impl Peers {
    async fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(self.state_dir.join(SOCKET)).await?;
        check(&stream, &self.trusted).await?;
        Ok(stream)
    }

    /// Requests the listening sockets of the agent that serves.
    pub async fn ask(&self) -> HandoverAnswer {
        let mut answer = self.attempt().await;
        for _ in 1..ATTEMPTS {
            match answer {
                Ok(None) => sleep(PAUSE).await,
                Ok(Some(answer)) => return answer,
                Err(error) => return HandoverAnswer::Silent(error.to_string()),
            }
            answer = self.attempt().await;
        }
        match answer {
            Ok(Some(answer)) => answer,
            Ok(None) => HandoverAnswer::Silent("it closes the connection".to_owned()),
            Err(error) => HandoverAnswer::Silent(error.to_string()),
        }
    }

    /// Requests the cached credentials of the agent that serves, serialized; `None` if there is no agent, or it sends none. Then
    /// all credentials are requested from STS.
    pub(super) async fn sealed_credentials(&self) -> Option<Zeroizing<Vec<u8>>> {
        let exchange = async {
            let mut stream = self.connect().await?;
            stream.write_all(message::CREDENTIALS).await?;
            let given = message::receive(&stream).await?;
            let [held] = <[OwnedFd; 1]>::try_from(given.unwrap_or_default())
                .map_err(|_| io::Error::other("it does not know the request"))?;
            sealed::open(held)
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer within 2 s");
        match timeout(ANSWER_DEADLINE, exchange).await.map_err(late).flatten() {
            Ok(held) => Some(held),
            Err(error) if gone(&error) => None,
            Err(error) => {
                warn!(%error, "The running agent sent no credentials; requesting all of them from STS");
                None
            }
        }
    }

    /// Whether an agent serves, is not hung, and will serve for as long as needed. One late answer does not count as hung: a
    /// node that starts many pods is busy.
    pub async fn is_served(&self) -> bool {
        let exchange = async || {
            let mut stream = self.connect().await?;
            stream.write_all(message::PRESENCE).await?;
            stream.read_u8().await
        };
        for _ in 0..PRESENCE_ATTEMPTS {
            match timeout(ANSWER_DEADLINE, exchange()).await {
                Ok(Ok(byte)) => return byte == message::PRESENT,
                Ok(Err(error)) if gone(&error) => return false,
                Ok(Err(_)) => sleep(PAUSE).await,
                Err(_) => {}
            }
        }
        false
    }

    /// One exchange; `None` if the peer closed the connection.
    async fn attempt(&self) -> io::Result<Option<HandoverAnswer>> {
        let mut stream = match self.connect().await {
            Ok(stream) => stream,
            Err(error) if gone(&error) => return Ok(Some(HandoverAnswer::Nobody)),
            Err(error) => return Err(error),
        };
        let exchange = async {
            match stream.write_all(message::REQUEST).await {
                Err(error) if gone(&error) => Ok(None),
                Err(error) => Err(error),
                Ok(()) => message::receive(&stream).await,
            }
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer within 2 s");
        match timeout(ANSWER_DEADLINE, exchange).await.map_err(late)? {
            Ok(Some(given)) => {
                let sockets = given.into_iter().filter_map(listener).collect();
                Ok(Some(HandoverAnswer::Sockets(Handover { stream, sockets })))
            }
            Ok(None) => Ok(None),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

// === impl Handover ===

impl Handover {
    /// Removes and returns the socket that listens at `address`, if there is one.
    pub fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let at = |socket: &TcpListener| socket.local_addr().is_ok_and(|local| local == address);
        let index = self.sockets.iter().position(at)?;
        Some(self.sockets.swap_remove(index))
    }

    /// Removes and returns the sockets that `is_other` selects, which are not node listeners.
    pub fn extract(&mut self, is_other: impl Fn(&TcpListener) -> bool) -> Vec<TcpListener> {
        self.sockets.extract_if(.., |socket| is_other(socket)).collect()
    }

    /// Whether the predecessor still waits for the last message.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        // The predecessor sends nothing more, so readable means closed.
        let read = self.stream.try_read(&mut [0]);
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Notifies the predecessor that it is superseded, and whether all its sockets are used; `false` if that fails.
    pub async fn taken(mut self) -> bool {
        let all = self.sockets.is_empty();
        let word = if all { message::TAKEN } else { message::TAKEN_ELSEWHERE };
        match self.stream.write_all(&[word]).await {
            Ok(()) => {
                debug!("Superseded the previous agent");
                true
            }
            Err(error) => {
                warn!(%error, "Notifying the previous agent that it is superseded failed");
                false
            }
        }
    }
}

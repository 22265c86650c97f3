//! The end of the agent that starts.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::fd::OwnedFd,
    path::Path,
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

use super::{PeerJudge, SOCKET, check, gone, message, sealed};

/// How long an agent that lives may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);
/// A predecessor that is superseded by another successor closes without an answer; soon that one listens.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);
/// Questions in vain before an agent is taken to hang.
const PRESENCE_ATTEMPTS: u32 = 3;

/// What came of asking.
#[derive(Debug)]
pub enum HandoverAnswer {
    /// No agent runs.
    Nobody,
    /// One runs and gives nothing: it hangs, or does not speak with us.
    Silent(String),
    /// Its sockets.
    Sockets(Handover),
}

/// Sockets of the agent that runs, which goes on serving until [`Handover::taken`].
#[derive(Debug)]
pub struct Handover {
    stream: UnixStream,
    sockets: Vec<TcpListener>,
}

/// Asks the agent that runs with this `state_dir` for its listening sockets.
pub async fn ask(state_dir: &Path, trusted: &PeerJudge) -> HandoverAnswer {
    let mut answer = attempt(state_dir, trusted).await;
    for _ in 1..ATTEMPTS {
        match answer {
            Ok(None) => sleep(PAUSE).await,
            Ok(Some(answer)) => return answer,
            Err(error) => return HandoverAnswer::Silent(error.to_string()),
        }
        answer = attempt(state_dir, trusted).await;
    }
    match answer {
        Ok(Some(answer)) => answer,
        Ok(None) => HandoverAnswer::Silent("it closes the connection".to_owned()),
        Err(error) => HandoverAnswer::Silent(error.to_string()),
    }
}

/// What the agent that runs with this `state_dir` holds, in the form that it gives it; `None` when there is none, or it
/// gives nothing: then everything is fetched anew.
pub async fn credentials(state_dir: &Path, trusted: &PeerJudge) -> Option<Zeroizing<Vec<u8>>> {
    let exchange = async {
        let mut stream = UnixStream::connect(state_dir.join(SOCKET)).await?;
        check(&stream, trusted).await?;
        stream.write_all(message::CREDENTIALS).await?;
        let given = message::receive(&stream).await?;
        let [held] = <[OwnedFd; 1]>::try_from(given.unwrap_or_default())
            .map_err(|_| io::Error::other("it does not know the question"))?;
        sealed::open(held)
    };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer within 2 s");
    match timeout(ANSWER_DEADLINE, exchange).await.map_err(late).flatten() {
        Ok(held) => Some(held),
        Err(error) if gone(&error) => None,
        Err(error) => {
            warn!(%error, "The agent that runs gives no credentials; asking STS for all of them");
            None
        }
    }
}

/// Whether an agent that does not hang serves with this `state_dir`, and will for as long as it is needed. One late answer is no hanging: a node that
/// starts many pods is busy.
pub async fn is_served(state_dir: &Path, trusted: &PeerJudge) -> bool {
    let exchange = async || {
        let mut stream = UnixStream::connect(state_dir.join(SOCKET)).await?;
        check(&stream, trusted).await?;
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

/// One exchange; `None` when the other end closed.
async fn attempt(state_dir: &Path, trusted: &PeerJudge) -> io::Result<Option<HandoverAnswer>> {
    let mut stream = match UnixStream::connect(state_dir.join(SOCKET)).await {
        Ok(stream) => stream,
        Err(error) if gone(&error) => return Ok(Some(HandoverAnswer::Nobody)),
        Err(error) => return Err(error),
    };
    check(&stream, trusted).await?;
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

/// What is no listening TCP socket is dropped.
fn listener(given: OwnedFd) -> Option<TcpListener> {
    if !sockopt::socket_acceptconn(&given).unwrap_or_default() {
        return None;
    }
    let listener = TcpListener::from(given);
    listener.local_addr().is_ok().then_some(listener)
}

// === impl Handover ===

impl Handover {
    /// The socket that listens at `address`, if the predecessor had one.
    pub fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let at = |socket: &TcpListener| socket.local_addr().is_ok_and(|local| local == address);
        let index = self.sockets.iter().position(at)?;
        Some(self.sockets.swap_remove(index))
    }

    /// Takes out the sockets that `is_other` picks: they are none of the node's.
    pub fn extract(&mut self, is_other: impl Fn(&TcpListener) -> bool) -> Vec<TcpListener> {
        self.sockets.extract_if(.., |socket| is_other(socket)).collect()
    }

    /// Whether the predecessor still waits for the last word.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        // It sends nothing more: what can be read is its end.
        let read = self.stream.try_read(&mut [0]);
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Tells the predecessor that it is superseded, and whether all its sockets were taken; `false` when it could
    /// not be told.
    pub async fn taken(mut self) -> bool {
        let all = self.sockets.is_empty();
        let word = if all { message::TAKEN } else { message::TAKEN_ELSEWHERE };
        match self.stream.write_all(&[word]).await {
            Ok(()) => {
                debug!("The agent before this one is superseded");
                true
            }
            Err(error) => {
                warn!(%error, "The agent before this one could not be told that it is superseded");
                false
            }
        }
    }
}

//! The running agent's side of a handover.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use super::{PeerJudge, SOCKET, check, gone, message, sealed};
use kiam_core::{lifecycle::Drain, ticks::ticks};

/// The deadline of a request: successors send it at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(2);
/// The deadline of the successor's last message: it loads and attaches the kernel programs before that.
const TAKEN_DEADLINE: Duration = Duration::from_secs(30);
/// The time between two checks whether another agent listens at the path, which its last message says sooner.
const OWNER_CHECK: Duration = Duration::from_secs(5);

/// What an agent passes to its successor, evaluated at the request.
pub struct HandoverContent {
    /// The listening sockets.
    pub sockets: Box<dyn Fn() -> io::Result<Vec<OwnedFd>> + Send + Sync>,
    /// The cached credentials, serialized.
    pub credentials: Box<dyn Fn() -> Zeroizing<Vec<u8>> + Send + Sync>,
    /// Whether the agent serves for as long as the successor needs. Otherwise the successor takes over at once.
    pub stays: Box<dyn Fn() -> bool + Send + Sync>,
}

/// The running agent's offer of its sockets to a successor.
#[derive(Debug)]
pub struct Offer {
    listener: UnixListener,
    path: PathBuf,
    /// The device and the inode of the socket's path.
    file: (u64, u64),
}

/// Why an offer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfferEnd {
    /// A successor serves now.
    Taken {
        /// Whether the successor accepts from all of the same sockets.
        queue: bool,
    },
    /// The agent ends without a successor.
    Withdrawn,
}

/// The end of one exchange.
enum Exchange {
    /// The request was for the agent's presence or credentials, not for sockets.
    Answered,
    Taken {
        queue: bool,
    },
    /// The successor received the sockets and ended without its last message. It may have replaced the kernel programs.
    Abandoned,
}

// === impl Offer ===

impl Offer {
    /// Listens in `state_dir`, in place of the previous agent.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn bind(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(SOCKET);
        // Bound beside the path and renamed, so that some agent always listens.
        let draft = state_dir.join(format!(".{SOCKET}.{:08x}", fastrand::u32(..)));
        let listener = UnixListener::bind(&draft)?;
        // Between bind and this, the folder's own mode (0700) keeps others out.
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))?;
        let file = identity(&draft)?;
        fs::rename(&draft, &path)?;
        Ok(Self { listener, path, file })
    }

    /// Serves successors until one has taken over or `drain` begins. An exchange in progress is finished first. `abandoned` is
    /// called when a successor with the sockets ends.
    pub async fn stand(
        mut self,
        content: HandoverContent,
        trusted: PeerJudge,
        abandoned: impl Fn(),
        mut drain: Drain,
    ) -> OfferEnd {
        let mut checks = ticks(OWNER_CHECK);
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => match exchange(stream, &content, &trusted).await {
                        Ok(Exchange::Taken { queue }) => return OfferEnd::Taken { queue },
                        Ok(Exchange::Answered) => {}
                        Ok(Exchange::Abandoned) => {
                            warn!("The successor ended before it took over; this agent continues");
                            abandoned();
                        }
                        Err(error) => warn!(%error, "Handing over the sockets failed"),
                    },
                    Err(error) => {
                        warn!(%error, "Accepting a connection failed");
                        sleep(Duration::from_millis(50)).await;
                    }
                },
                _ = checks.tick() => {
                    if self.is_superseded().await {
                        return OfferEnd::Taken { queue: false };
                    }
                }
                () = drain.started() => {
                    // An agent that hung until now may have missed a takeover.
                    let superseded = self.is_superseded().await;
                    return if superseded { OfferEnd::Taken { queue: false } } else { OfferEnd::Withdrawn };
                }
            }
        }
    }

    /// Whether another agent listens at the path. The socket of a dead agent is replaced.
    async fn is_superseded(&mut self) -> bool {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            return false;
        }
        match UnixStream::connect(&self.path).await {
            Err(error) if gone(&error) => {}
            // A busy agent counts, too.
            _ => return true,
        }
        match self.path.parent().map(Self::bind) {
            Some(Ok(again)) => *self = again,
            Some(Err(error)) => error!(%error, "Recreating the socket for a successor failed"),
            None => {}
        }
        false
    }
}

async fn exchange(
    mut stream: UnixStream,
    content: &HandoverContent,
    trusted: &PeerJudge,
) -> io::Result<Exchange> {
    check(&stream, trusted).await?;
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the peer sent no request within 2 s");
    let mut request = [0; message::REQUEST.len()];
    match timeout(REQUEST_DEADLINE, stream.read_exact(&mut request)).await.map_err(late)? {
        // The peer only checked whether an agent listens.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok(Exchange::Answered);
        }
        read => read?,
    };
    if request == *message::PRESENCE {
        let stays = (content.stays)();
        stream.write_all(&[if stays { message::PRESENT } else { message::LEAVING }]).await?;
        return Ok(Exchange::Answered);
    }
    if request == *message::CREDENTIALS {
        let held = sealed::seal(&(content.credentials)())?;
        message::send(&stream, &[held]).await?;
        return Ok(Exchange::Answered);
    }
    if request != *message::REQUEST {
        let text =
            format!("the peer speaks another protocol: {:?}", request.escape_ascii().to_string());
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    message::send(&stream, &(content.sockets)()?).await?;
    info!("Passed the sockets to a newer agent; serving until it takes over");
    let mut last = [0];
    match timeout(TAKEN_DEADLINE, stream.read_exact(&mut last)).await {
        Ok(Ok(_)) if last == [message::TAKEN] => Ok(Exchange::Taken { queue: true }),
        Ok(Ok(_)) if last == [message::TAKEN_ELSEWHERE] => Ok(Exchange::Taken { queue: false }),
        _ => Ok(Exchange::Abandoned),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

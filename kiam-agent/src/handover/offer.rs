//! The end of the agent that runs.

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
    time::{interval, sleep, timeout},
};
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use super::{PeerJudge, SOCKET, check, gone, message, sealed};
use kiam_core::lifecycle::Drain;

/// The successor asks at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(2);
/// A successor that has the sockets still loads and attaches the kernel programs.
const TAKEN_DEADLINE: Duration = Duration::from_secs(30);
const OWNER_CHECK: Duration = Duration::from_secs(1);

/// What an agent content to its successor, as it is when that asks.
pub struct HandoverContent {
    /// The listening sockets.
    pub sockets: Box<dyn Fn() -> io::Result<Vec<OwnedFd>> + Send + Sync>,
    /// The credentials that it holds, in a form that the successor knows.
    pub credentials: Box<dyn Fn() -> Zeroizing<Vec<u8>> + Send + Sync>,
    /// Whether it serves for as long as the successor needs. If not, that one takes over with what it has.
    pub stays: Box<dyn Fn() -> bool + Send + Sync>,
}

/// The standing offer of the agent that runs: its sockets, to whoever comes after it.
#[derive(Debug)]
pub struct Offer {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket's path.
    file: (u64, u64),
}

/// Why an offer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfferEnd {
    /// A successor serves now; `queue`: it accepts from the same sockets.
    Taken {
        /// From all of them.
        queue: bool,
    },
    /// The agent ends; no successor came.
    Withdrawn,
}

/// How one exchange ended.
enum Exchange {
    /// It wanted no sockets, but to know whether somebody is there, or what is held.
    Answered,
    Taken {
        queue: bool,
    },
    /// The successor got the sockets and went without the last word. It may have replaced the kernel programs.
    Abandoned,
}

// === impl Offer ===

impl Offer {
    /// Listens in `state_dir`, in the place of whoever did before: whoever asks is sent here from now on.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn bind(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(SOCKET);
        // Made beside it and renamed, so that at no instant nobody listens there.
        let draft = state_dir.join(format!(".{SOCKET}.{:08x}", fastrand::u32(..)));
        let listener = UnixListener::bind(&draft)?;
        // Between bind and this, the folder's own mode (0700) keeps others out.
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))?;
        let file = identity(&draft)?;
        fs::rename(&draft, &path)?;
        Ok(Self { listener, path, file })
    }

    /// HandoverContent to each successor that asks, until one has taken over or `drain` begins; an exchange that has begun is
    /// finished first. `abandoned` is called when a successor went with the sockets.
    pub async fn stand(
        mut self,
        content: HandoverContent,
        trusted: PeerJudge,
        abandoned: impl Fn(),
        mut drain: Drain,
    ) -> OfferEnd {
        let mut checks = interval(OWNER_CHECK);
        loop {
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => match exchange(stream, &content, &trusted).await {
                        Ok(Exchange::Taken { queue }) => return OfferEnd::Taken { queue },
                        Ok(Exchange::Answered) => {}
                        Ok(Exchange::Abandoned) => {
                            warn!("An agent that was to take over went away; this one goes on");
                            abandoned();
                        }
                        Err(error) => warn!(%error, "Sockets not handed over"),
                    },
                    Err(error) => {
                        warn!(%error, "Connection not accepted");
                        sleep(Duration::from_millis(50)).await;
                    }
                },
                _ = checks.tick() => {
                    if self.is_superseded().await {
                        return OfferEnd::Taken { queue: false };
                    }
                }
                () = drain.started() => {
                    // Who hung until now may have missed that.
                    let superseded = self.is_superseded().await;
                    return if superseded { OfferEnd::Taken { queue: false } } else { OfferEnd::Withdrawn };
                }
            }
        }
    }

    /// Whether another agent listens at the path. One that died there is replaced.
    async fn is_superseded(&mut self) -> bool {
        if identity(&self.path).is_ok_and(|file| file == self.file) {
            return false;
        }
        match UnixStream::connect(&self.path).await {
            Err(error) if gone(&error) => {}
            // Also one that is too busy to be asked is there.
            _ => return true,
        }
        match self.path.parent().map(Self::bind) {
            Some(Ok(again)) => *self = again,
            Some(Err(error)) => error!(%error, "The socket for a successor can't be made anew"),
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
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "the peer asked for nothing within 2 s");
    let mut request = [0; message::REQUEST.len()];
    match timeout(REQUEST_DEADLINE, stream.read_exact(&mut request)).await.map_err(late)? {
        // It only looked whether somebody listens.
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
    info!("A newer agent has the sockets; serving until it does");
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

//! Gets the node's sockets, those of the running agent or new ones, and passes the sockets and the cached credentials to
//! the next agent, so that a takeover neither rejects connections nor requests credentials again.
//!
//! Credentials go in sealed memory, from one running agent to another. Nothing is kept for an agent that starts later: a
//! file would outlive the agent, and every tool that dumps maps reads a pinned map.
//!
//! There is one exchange over a Unix socket in `--state-dir`: the successor requests the sockets, receives them, and
//! reports when it serves on them. Until then the predecessor continues as before. For an instant both accept from the
//! same queue. The agent that listens at the socket's path is the agent of the node: a process that finds a running
//! successor there is superseded, even without a message.
//!
//! Only root of the node can connect, since the folder is 0700, and a container only if the folder is mounted. The
//! peer's uid must be the agent's. Its process, if it is visible, is checked by a [`PeerJudge`]. Another container's
//! process has no number here (`SO_PEERCRED` shows 0), so that nothing more is known. But a root process that can read
//! this folder has the key of the session tokens already.

mod departure;
mod first_pass;
mod message;
mod offer;
mod peers;
mod sealed;
mod sockets;
mod standing_offer;
mod successor;

use std::{io, sync::Arc};

use tokio::net::UnixStream;

pub use self::{
    departure::{Course, Departure, Request, Signals},
    first_pass::FirstPass,
    offer::{HandoverContent, Offer, OfferEnd},
    peers::Peers,
    sockets::{Addresses, Error, Listeners, OperatorSockets, Takeover},
    standing_offer::StandingOffer,
    successor::{Handover, HandoverAnswer},
};

use kiam_core::blocking::{self, Blocking};

/// Name of the Unix socket in the state folder.
pub const SOCKET: &str = "handover.sock";

/// The check of a peer's process by its number, on a thread that may block, since it reads `/proc` and cgroups.
#[derive(Clone)]
pub struct PeerJudge(Arc<Judge>);

type Judge = dyn Fn(&Blocking, u32) -> bool + Send + Sync;

impl PeerJudge {
    /// A check by the function `judge`.
    pub fn new(judge: impl Fn(&Blocking, u32) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(judge))
    }

    /// Whether the process `pid` is trusted; false if the check panics.
    async fn judge(&self, pid: u32) -> bool {
        let judge = self.0.clone();
        blocking::spawn(move |token| judge(token, pid)).await.unwrap_or(false)
    }
}

/// Checks the peer. The error has the reason for a rejection.
async fn check(stream: &UnixStream, trusted: &PeerJudge) -> io::Result<()> {
    let refused = |reason: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
    let peer = stream.peer_cred()?;
    let (uid, own) = (peer.uid(), rustix::process::geteuid().as_raw());
    if uid != own {
        return refused(format!("its user is {uid}, not {own}"));
    }
    match peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0) {
        Some(pid) if !trusted.judge(pid).await => {
            refused(format!("process {pid} belongs to a pod"))
        }
        _ => Ok(()),
    }
}

/// Whether the error means that the peer's process has ended.
fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
    )
}

#[cfg(test)]
mod tests;

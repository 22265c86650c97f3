//! Passes the listening sockets from the agent that runs to its successor, so that no connection is refused
//! between them, and before that the credentials that it holds, so that none are asked for again.
//!
//! Credentials go in sealed memory, from an agent that lives to one that lives. Nothing is kept for an agent that
//! comes later: a file would outlive the agent, and a pinned map is read by every tool that dumps maps.
//!
//! One exchange over a Unix socket in `--state-dir`: the successor asks, gets the sockets, and when it serves on
//! them says that it took over. Until then the predecessor goes on as if nobody had asked; for an instant both
//! accept from the same queue. Whoever listens at the socket's path is the agent of the node: a process that finds
//! a living successor there has been superseded, even if it heard nothing.
//!
//! Who may ask: the folder is 0700, so only root of the node, and a container only where the folder is mounted.
//! The peer's uid is compared with ours, and its process, where we can see it, is judged by the caller. Another
//! container's process has no number here (`SO_PEERCRED` shows 0), so of that no more can be known; but who is
//! root and reads this folder has the key of the session tokens already.

mod message;
mod offer;
mod sealed;
mod successor;

use std::{io, sync::Arc};

use tokio::net::UnixStream;

pub use self::{
    offer::{HandoverContent, Offer, OfferEnd},
    successor::{Handover, HandoverAnswer, ask, credentials, is_served},
};

use kiam_core::blocking::{self, Blocking};

/// Name of the Unix socket in the state folder.
pub const SOCKET: &str = "handover.sock";

/// Judges a peer's process by its number, on a thread that may block: `/proc` and cgroups are asked.
#[derive(Clone)]
pub struct PeerJudge(Arc<Judge>);

type Judge = dyn Fn(&Blocking, u32) -> bool + Send + Sync;

impl PeerJudge {
    /// As `judge` says.
    pub fn new(judge: impl Fn(&Blocking, u32) -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(judge))
    }

    /// Not where there is no answer.
    async fn judge(&self, pid: u32) -> bool {
        let judge = self.0.clone();
        blocking::spawn(move |token| judge(token, pid)).await.unwrap_or(false)
    }
}

/// Whether the other end is one to speak with; says why not.
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

/// Errors that a process which ended leaves.
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

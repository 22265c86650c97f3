//! The kernel's notices that rules, or routes and links, changed.

use std::io;

use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE,
};
use tracing::warn;

/// `RTNLGRP_IPV4_RULE` and `RTNLGRP_IPV6_RULE` of `linux/rtnetlink.h`.
const RULES: [u32; 2] = [8, 19];
/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_ROUTE` and `RTNLGRP_IPV6_ROUTE`.
const UPLINKS: [u32; 3] = [1, 7, 11];
/// What a notice says is not read: it may be cut.
const NOTICE: usize = 4096;

/// Tells that something of a kind changed, not what.
pub(super) struct Changes(TokioSocket);

// === impl Changes ===

impl Changes {
    /// Of rules, in the network namespace of this thread.
    pub(super) fn of_rules() -> io::Result<Self> {
        Self::of(&RULES)
    }

    /// Of routes and links, in the network namespace of this thread.
    pub(super) fn of_uplinks() -> io::Result<Self> {
        Self::of(&UPLINKS)
    }

    fn of(groups: &[u32]) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.socket_mut().add_membership(*group)?;
        }
        Ok(Self(socket))
    }

    /// Returns after a change; all that came until then are one.
    pub(super) async fn next(&self) -> io::Result<()> {
        let mut notice = Vec::with_capacity(NOTICE);
        lost_is_fine(self.0.recv(&mut notice).await)?;
        loop {
            notice.clear();
            match lost_is_fine(self.0.socket_ref().recv(&mut notice, 0).map(drop)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                result => result?,
            }
        }
    }
}

/// The next change; never, where there are no notices.
pub(super) async fn next(changes: Option<&Changes>) -> io::Result<()> {
    match changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    }
}

/// Without its notices, the sweeps see a change later.
pub(super) fn seen(notice: io::Result<()>, changes: &mut Option<Changes>) {
    if let Err(error) = notice {
        warn!(%error, "Changes of routing are not seen at once any more");
        *changes = None;
    }
}

/// `ENOBUFS`: more notices came than fit. That there was a change is all that counts.
fn lost_is_fine(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.raw_os_error() {
        Some(libc::ENOBUFS) => Ok(()),
        _ => Err(error),
    })
}

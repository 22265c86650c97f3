//! The kernel's notifications about changes of rules, routes and links.

use std::io;

use netlink_sys::{
    AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE,
};
use tracing::warn;

/// `RTNLGRP_IPV4_RULE` and `RTNLGRP_IPV6_RULE` of `linux/rtnetlink.h`.
const RULES: [u32; 2] = [8, 19];
/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_ROUTE` and `RTNLGRP_IPV6_ROUTE`.
const UPLINKS: [u32; 3] = [1, 7, 11];
/// The buffer of a notification, whose content is not read and may be truncated.
const NOTICE: usize = 4096;

/// A stream of notifications that something of a kind changed.
pub(super) struct Changes(TokioSocket);

// === impl Changes ===

impl Changes {
    /// Changes of rules, in the network namespace of this thread.
    pub(super) fn of_rules() -> io::Result<Self> {
        Self::of(&RULES)
    }

    /// Changes of routes and links, in the network namespace of this thread.
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

    /// Waits for a change. All notifications that have come until then count as one.
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

/// Waits for the next change, for ever without notifications.
pub(super) async fn next(changes: Option<&Changes>) -> io::Result<()> {
    match changes {
        Some(changes) => changes.next().await,
        None => std::future::pending().await,
    }
}

/// Stops listening after an error; then only the sweeps see changes.
pub(super) fn seen(notice: io::Result<()>, changes: &mut Option<Changes>) {
    if let Err(error) = notice {
        warn!(%error, "Changes of routing are only seen once a minute from now on: the kernel's notifications failed");
        *changes = None;
    }
}

/// Ignores `ENOBUFS`: some notifications were lost, but one is enough.
fn lost_is_fine(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.raw_os_error() {
        Some(libc::ENOBUFS) => Ok(()),
        _ => Err(error),
    })
}

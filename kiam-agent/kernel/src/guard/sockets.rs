//! Ends the connections to the IMDS that pods had before the programs were attached: the hooks run at connect, and
//! these are past it.

use std::{io, net::IpAddr, ops::ControlFlow, path::PathBuf, time::Duration};

use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, SockDiagDestroy, SockDiagMessage,
    inet::{InetRequest, InetResponse, SocketId, StateFlags},
};
use tokio::time::Instant;
use tracing::warn;

use super::{Metrics, route::imds_addresses};
use crate::sys::{
    Cgroup, Walk,
    namespaces::{SearchGaps, inside, of_pods},
    netlink::Netlink,
    rejection::kernel_release,
    sock_diag::{cgroup_id, tcp_sockets},
};
use kiam_core::blocking::Blocking;

/// How long all of it may take, and one namespace, where a pod may have any number of sockets.
const TIME: Duration = Duration::from_secs(60);
const NAMESPACE_TIME: Duration = Duration::from_secs(1);
/// Connections that are ended in one namespace: all that there may be to one address and port.
const SOCKETS: usize = 1 << 16;

/// What [`destroy`] did.
#[derive(Debug, Default)]
pub(super) struct DestroyReport {
    /// Connections that ended.
    pub(super) sockets: u64,
    /// Namespaces that were searched.
    pub(super) namespaces: u64,
    /// What was not searched.
    pub(super) unseen: SearchGaps,
    /// The first reason why a connection or a namespace was left out.
    pub(super) failure: Option<io::Error>,
}

/// Which sockets of a namespace are meant.
enum Scope<'a> {
    /// All: the namespace is a pod's.
    Anyone,
    /// Those that were made in the pods' cgroup, but for the agent's own pod.
    Pods { cgroup: &'a Cgroup, own: Option<PathBuf> },
}

/// Destroys the pods' TCP sockets that are connected to the IMDS. In the node's own namespace, only with `host`,
/// and only those made in the pods' cgroup `cgroup`; never those of the agent's own pod.
pub(super) fn destroy(blocking: &Blocking, cgroup: &Cgroup, host: bool) -> DestroyReport {
    let mut walk = Walk::new(blocking, TIME);
    let until = walk.until();
    let mut destroyed = DestroyReport::default();
    // First: there each socket is somebody's own matter, and no pod decides how many namespaces there are.
    if host {
        let own = cgroup.own_pod().and_then(|own| cgroup.path_of(own).ok());
        destroyed.add(destroy_here(&Scope::Pods { cgroup, own }, until));
    }
    destroyed.unseen = of_pods(&mut walk, cgroup.path(), |namespace| {
        let until = until.min(Instant::now() + NAMESPACE_TIME);
        destroyed.add(inside(namespace, || destroy_here(&Scope::Anyone, until)));
        ControlFlow::Continue(())
    });
    destroyed
}

// === impl DestroyReport ===

impl DestroyReport {
    fn add(&mut self, result: io::Result<u64>) {
        match result {
            Ok(sockets) => {
                self.sockets += sockets;
                self.namespaces += 1;
            }
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    /// Tells of it.
    pub(super) fn report(&self, metrics: &Metrics) {
        metrics.destroyed.inc_by(self.sockets);
        if self.sockets > 0 {
            warn!(
                sockets = self.sockets,
                namespaces = self.namespaces,
                "Ended connections to the IMDS that pods had before"
            );
        }
        if self.unseen.hidden > 0 {
            warn!(
                processes = self.unseen.hidden,
                "Pods' processes are not to be seen from here, so connections that they have to the IMDS stay until they end: run the agent with hostPID"
            );
        }
        if self.unseen.pods > 0 {
            warn!(
                pods = self.unseen.pods,
                "Not everything of these pods was searched for connections to the IMDS, as they have too many cgroups, processes or namespaces: such a connection stays until it closes, unless the route guard is on"
            );
        }
        if let Some(error) = &self.failure {
            warn!(
                %error,
                kernel = kernel_release(),
                "Not every connection that a pod had to the IMDS could be ended (this needs kernel 4.5, with CONFIG_INET_DIAG_DESTROY and the module tcp_diag): such a connection stays until it closes, unless the route guard is on"
            );
        }
    }
}

/// Destroys in the namespace of this thread; how many sockets.
fn destroy_here(of: &Scope<'_>, until: Instant) -> io::Result<u64> {
    let mut sockets = 0;
    let orders = Netlink::sock_diag()?;
    for family in [AF_INET, AF_INET6] {
        for socket_id in to_imds(family, of, until)? {
            let request = InetRequest { socket_id, ..tcp_sockets(family, connected()) };
            let order = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
            match orders.order(order, 0) {
                Ok(()) => sockets += 1,
                // It closed by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(sockets)
}

/// The sockets of one family that are meant.
fn to_imds(family: u8, of: &Scope<'_>, until: Instant) -> io::Result<Vec<SocketId>> {
    let mut found = Vec::new();
    let question = SockDiagMessage::InetRequest(tcp_sockets(family, connected()));
    Netlink::sock_diag()?.each(question, |answer| {
        if Instant::now() >= until || found.len() == SOCKETS {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "there are too many sockets"));
        }
        if let SockDiagMessage::InetResponse(socket) = answer
            && is_to_imds(&socket.header.socket_id)
            && of.has(&socket)?
        {
            found.push(socket.header.socket_id);
        }
        Ok(())
    })?;
    Ok(found)
}

/// The states of sockets that have another end.
fn connected() -> StateFlags {
    StateFlags::all() - (StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::TIME_WAIT)
}

fn is_to_imds(id: &SocketId) -> bool {
    let to: IpAddr = id.destination_address.to_canonical();
    imds_addresses().contains(&to)
}

// === impl Scope ===

impl Scope<'_> {
    /// By the socket's cgroup, not by a list of all of them, which tenants make. One that was removed may have been a
    /// pod's.
    fn has(&self, socket: &InetResponse) -> io::Result<bool> {
        let Self::Pods { cgroup, own } = self else { return Ok(true) };
        let Some(id) = cgroup_id(socket) else { return Ok(false) };
        match cgroup.path_of(id) {
            Ok(path) => {
                let is_own = own.as_ref().is_some_and(|own| path.starts_with(own));
                Ok(path.starts_with(cgroup.path()) && !is_own)
            }
            Err(error) if error.raw_os_error() == Some(libc::ESTALE) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

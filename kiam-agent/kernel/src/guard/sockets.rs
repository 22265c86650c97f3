//! Ends the connections to the IMDS that pods had before the programs were attached, which the connect hooks can't see.

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

/// The longest run, and the longest time in one namespace, where a pod may have any number of sockets.
const TIME: Duration = Duration::from_secs(60);
const NAMESPACE_TIME: Duration = Duration::from_secs(1);
/// The most connections ended in one namespace: as many as there can be to one address and port.
const SOCKETS: usize = 1 << 16;

/// The result of [`destroy`].
#[derive(Debug, Default)]
pub(super) struct DestroyReport {
    /// Ended connections.
    pub(super) sockets: u64,
    /// Searched namespaces.
    pub(super) namespaces: u64,
    /// Pods and processes that were not searched.
    pub(super) unseen: SearchGaps,
    /// The first error for which a connection or a namespace was skipped.
    pub(super) failure: Option<io::Error>,
}

/// The sockets of a namespace that are to be ended.
enum Scope<'a> {
    /// All of them: the namespace is a pod's.
    Anyone,
    /// Those that were created in the pods' cgroup, except by the agent's own pod.
    Pods { cgroup: &'a Cgroup, own: Option<PathBuf> },
}

/// Destroys the pods' TCP sockets that are connected to the IMDS. In the node's own namespace this is done only with
/// `host`, and only for sockets that were created in the pods' `cgroup`. The agent's own pod keeps its sockets.
pub(super) fn destroy(blocking: &Blocking, cgroup: &Cgroup, host: bool) -> DestroyReport {
    let mut walk = Walk::new(blocking, TIME);
    let until = walk.until();
    let mut destroyed = DestroyReport::default();
    // First, because no pod can prolong this part by creating namespaces.
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

    /// Logs and counts the result.
    pub(super) fn report(&self, metrics: &Metrics) {
        metrics.destroyed.inc_by(self.sockets);
        if self.sockets > 0 {
            warn!(
                sockets = self.sockets,
                namespaces = self.namespaces,
                "Ended pods' connections to the IMDS that were older than the agent"
            );
        }
        if self.unseen.hidden > 0 {
            warn!(
                processes = self.unseen.hidden,
                "The agent can't see all processes of pods, so their older connections to the IMDS stay until they close: run the agent with hostPID"
            );
        }
        if self.unseen.pods > 0 {
            warn!(
                pods = self.unseen.pods,
                "Some pods have too many cgroups, processes or namespaces to search all of them for connections to the IMDS: such a connection stays until it closes, unless the route guard is on"
            );
        }
        if let Some(error) = &self.failure {
            warn!(
                %error,
                kernel = kernel_release(),
                "Some pods' older connections to the IMDS can't be ended (this needs kernel 4.5, with CONFIG_INET_DIAG_DESTROY and the module tcp_diag): such a connection stays until it closes, unless the route guard is on"
            );
        }
    }
}

/// Destroys the sockets in the namespace of this thread, and returns their number.
fn destroy_here(scope: &Scope<'_>, until: Instant) -> io::Result<u64> {
    let mut sockets = 0;
    let orders = Netlink::sock_diag()?;
    for family in [AF_INET, AF_INET6] {
        for socket_id in to_imds(family, scope, until)? {
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

/// The sockets of one family that are to be destroyed.
fn to_imds(family: u8, scope: &Scope<'_>, until: Instant) -> io::Result<Vec<SocketId>> {
    let mut found = Vec::new();
    let question = SockDiagMessage::InetRequest(tcp_sockets(family, connected()));
    Netlink::sock_diag()?.each(question, |answer| {
        if Instant::now() >= until || found.len() == SOCKETS {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "there are too many sockets"));
        }
        if let SockDiagMessage::InetResponse(socket) = answer
            && is_to_imds(&socket.header.socket_id)
            && scope.has(&socket)?
        {
            found.push(socket.header.socket_id);
        }
        Ok(())
    })?;
    Ok(found)
}

/// The states of connected sockets.
fn connected() -> StateFlags {
    StateFlags::all() - (StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::TIME_WAIT)
}

fn is_to_imds(id: &SocketId) -> bool {
    let to: IpAddr = id.destination_address.to_canonical();
    imds_addresses().contains(&to)
}

// === impl Scope ===

impl Scope<'_> {
    /// Whether the socket's cgroup is in scope. This looks up one cgroup and lists none, since tenants create cgroups. A
    /// removed cgroup may have been a pod's.
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

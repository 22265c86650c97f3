//! Ends the connections to the IMDS that pods had before the programs were attached: the hooks run at connect, and
//! these are past it.

use std::{
    collections::HashSet, fs, io, net::IpAddr, ops::ControlFlow, os::unix::fs::MetadataExt as _,
    path::Path,
};

use netlink_packet_core::Nla as _;
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagDestroy, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags, nlas::Nla},
};
use tracing::warn;

use super::{
    Metrics,
    namespaces::{inside, of_pods},
    netlink::Netlink,
    route::imds_addresses,
};

/// The cgroup's id of a socket (`linux/inet_diag.h`). Kernel 5.8.
const INET_DIAG_CGROUP_ID: u16 = 21;

/// What [`destroy`] did.
#[derive(Debug, Default)]
pub(super) struct Destroyed {
    /// Connections that ended.
    pub(super) sockets: u64,
    /// Namespaces that were searched.
    pub(super) namespaces: u64,
    /// Processes of pods whose namespaces can't be seen.
    pub(super) hidden: usize,
    /// The first reason why a connection or a namespace was left out.
    pub(super) failure: Option<io::Error>,
}

/// Which sockets of a namespace are meant.
enum Of<'a> {
    /// All: the namespace is a pod's.
    Anyone,
    /// Those that these cgroups' processes made.
    Cgroups(&'a HashSet<u64>),
}

/// Destroys the pods' TCP sockets that are connected to the IMDS. In the node's own namespace, only with `host`,
/// and only those made in the pods' cgroup `cgroup`; never those of the agent's own pod, the cgroup `own`.
pub(super) fn destroy(cgroup: &Path, own: Option<u64>, host: bool) -> Destroyed {
    let mut destroyed = Destroyed::default();
    destroyed.hidden = of_pods(cgroup, |namespace| {
        destroyed.add(inside(namespace, || destroy_here(&Of::Anyone)));
        ControlFlow::Continue(())
    });
    if host {
        destroyed.add(destroy_here(&Of::Cgroups(&below(cgroup, own))));
    }
    destroyed
}

// === impl Destroyed ===

impl Destroyed {
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
        if self.hidden > 0 {
            warn!(
                processes = self.hidden,
                "Pods' processes are not to be seen from here, so connections that they have to the IMDS stay until they end: run the agent with hostPID"
            );
        }
        if let Some(error) = &self.failure {
            warn!(
                %error,
                "Not every connection that a pod had to the IMDS could be ended (this needs a kernel with CONFIG_INET_DIAG and CONFIG_INET_DIAG_DESTROY): such a connection stays until it closes, unless the route guard is on"
            );
        }
    }
}

/// Ids of `cgroup` and of all below it, without `own` and what is below that.
fn below(cgroup: &Path, own: Option<u64>) -> HashSet<u64> {
    let mut ids = HashSet::new();
    let mut cgroups = vec![cgroup.to_owned()];
    while let Some(cgroup) = cgroups.pop() {
        let Ok(metadata) = fs::metadata(&cgroup) else { continue };
        if own == Some(metadata.ino()) {
            continue;
        }
        ids.insert(metadata.ino());
        let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        cgroups.extend(below.map(|entry| entry.path()));
    }
    ids
}

/// Destroys in the namespace of this thread; how many sockets.
fn destroy_here(of: &Of<'_>) -> io::Result<u64> {
    let netlink = Netlink::sock_diag()?;
    let mut sockets = 0;
    for family in [AF_INET, AF_INET6] {
        for answer in netlink.dump(SockDiagMessage::InetRequest(every(family)))? {
            let SockDiagMessage::InetResponse(socket) = answer else { continue };
            if !is_to_imds(&socket.header.socket_id) || !of.has(&socket) {
                continue;
            }
            let request = InetRequest { socket_id: socket.header.socket_id, ..every(family) };
            let order = SockDiagDestroy::new(SockDiagMessage::InetRequest(request));
            match netlink.order(order, 0) {
                Ok(()) => sockets += 1,
                // It closed by itself.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(sockets)
}

/// TCP sockets of `family` that have another end. MPTCP's subflows are among them.
fn every(family: u8) -> InetRequest {
    let endless = StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::TIME_WAIT;
    InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all() - endless,
        socket_id: if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() },
    }
}

fn is_to_imds(id: &SocketId) -> bool {
    let to: IpAddr = id.destination_address.to_canonical();
    imds_addresses().contains(&to)
}

// === impl Of ===

impl Of<'_> {
    fn has(&self, socket: &InetResponse) -> bool {
        let ids = match self {
            Self::Anyone => return true,
            Self::Cgroups(ids) => ids,
        };
        socket.nlas.iter().any(|attribute| match attribute {
            Nla::Other(other) if other.kind() == INET_DIAG_CGROUP_ID => {
                let mut value = [0; 8];
                other.emit_value(&mut value);
                ids.contains(&u64::from_ne_bytes(value))
            }
            _ => false,
        })
    }
}

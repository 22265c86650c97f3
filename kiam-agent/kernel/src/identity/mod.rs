//! Identifies callers: from a 4-tuple to a cgroup to a pod UID.

mod cgroups;
mod kernel;
mod node;
mod pod_listener;
mod process;

pub use self::{
    cgroups::CgroupPaths,
    kernel::{KernelResolver, Namespaces},
    node::InterfaceAddresses,
    pod_listener::PodListenerResolver,
    process::{ContainerAge, ProcessReader},
};

pub(crate) use self::node::interfaces as interface_addresses;

use std::{
    fmt::Display,
    sync::{Arc, OnceLock},
};

use crate::{
    intercept::{FlowEntry, Flows},
    selftest::Witness,
};
use kiam_core::pods::{Client, ClientResolver, Connection, Opener, PodUid, Unattested};

/// The resolver of `--identity=source-ip`: only the source address is known, as in kiam.
#[derive(Clone, Debug, Default)]
pub struct SourceIpResolver {
    /// The witness of the self-test's connections.
    pub witness: Witness,
}

fn unreadable(error: impl Display) -> Unattested {
    Unattested::Unreadable(error.to_string())
}

/// The pod whose process opened the connection of `entry`, and that process. Only the cgroup decides about the pod.
fn opener(
    flows: &Flows,
    cgroups: &CgroupPaths,
    entry: FlowEntry,
) -> Result<(PodUid, Option<Arc<Opener>>), Unattested> {
    let FlowEntry { cgroup, socket, .. } = entry;
    let (uid, container) = cgroups.member(cgroup)?;
    let (process, inspection) = (flows.process(socket), OnceLock::new());
    let opener = Opener { socket, container, process, inspection };
    Ok((uid, Some(Arc::new(opener))))
}

// === impl SourceIpResolver ===

impl ClientResolver for SourceIpResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        if self.witness.saw_address(connection.peer) {
            return Err(Unattested::Selftest);
        }
        Ok(Client::Address(connection.peer.ip().to_canonical()))
    }
}

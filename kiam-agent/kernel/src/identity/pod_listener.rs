//! Identity at a pod listener.

use super::{CgroupPaths, opener};
use crate::intercept::Flows;
use kiam_core::pods::{Client, ClientResolver, Connection, PodUid, Unattested};

/// The resolver of one pod listener: the kernel's entry must be of the pod's namespace, and the process of the pod. A
/// connection without an entry (`kubectl port-forward`, a process that entered the namespace from outside) was not
/// redirected.
#[derive(Debug)]
pub struct PodListenerResolver {
    flows: Flows,
    cgroups: CgroupPaths,
    pod: PodUid,
    netns: u64,
}

// === impl PodListenerResolver ===

impl PodListenerResolver {
    /// A resolver for the pod listener of `pod`, in the network namespace of cookie `netns`.
    #[must_use]
    pub fn new(flows: Flows, cgroups: CgroupPaths, pod: PodUid, netns: u64) -> Self {
        Self { flows, cgroups, pod, netns }
    }
}

impl ClientResolver for PodListenerResolver {
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested> {
        let found = self.flows.find(self.netns, connection.peer, connection.local);
        let entry = found.map_err(super::unreadable)?.ok_or(Unattested::NoEntry)?;
        let (uid, opener) = opener(&self.flows, &self.cgroups, entry)?;
        if uid != self.pod {
            return Err(Unattested::OtherPod { caller: uid, listener: self.pod.clone() });
        }
        Ok(Client::PodListener { uid, opener })
    }
}

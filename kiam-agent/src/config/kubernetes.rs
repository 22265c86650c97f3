//! The flags that concern the Kubernetes API.

use std::{path::PathBuf, time::Duration};

use super::{DAY, Identity, SECOND, Vars, flags::Flags, given, values::Mistakes};
use crate::cluster;

/// The time since etcd was last heard from after which a list is due: early enough for another attempt before records
/// are stale.
pub(super) fn prove_after(identity: Identity, max_staleness: Option<Duration>) -> Duration {
    let usual = match identity {
        // Addresses are valid for 90 s.
        Identity::SourceIp => SECOND * 60,
        Identity::Kernel => SECOND * 240,
    };
    max_staleness.map_or(usual, |most| usual.min(most / 2))
}

/// What the flags say of the Kubernetes API.
pub(super) fn cluster(
    flags: &Flags,
    vars: &dyn Vars,
    prove_after: Duration,
    mistakes: &mut Mistakes,
) -> Option<cluster::Config> {
    let interval = mistakes.duration("sync-interval", &flags.sync_interval, SECOND, DAY);
    if flags.node_name.as_deref() == Some("") {
        mistakes.add("node-name", "it is empty: leave it out to watch the pods of all nodes");
    }
    let taint = flags.startup_taint.as_ref().filter(|key| !key.is_empty());
    let taint = taint.map(|key| mistakes.parse("startup-taint", key));
    if taint.is_some() && flags.node_name.is_none() {
        mistakes.add("startup-taint", "it needs --node-name: whose taint is it?");
    }
    let evict_older_pods = mistakes.switch("evict-older-pods", &flags.evict_older_pods);
    if evict_older_pods && flags.node_name.is_none() {
        mistakes.add("evict-older-pods", "it needs --node-name: which pods are this node's?");
    }
    let proxies = mistakes.proxies(vars);
    Some(cluster::Config {
        kubeconfig: flags.kubeconfig.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from),
        node_name: flags.node_name.clone(),
        sync_interval: interval?,
        // More than the minute between two bookmarks, and less than the 90 s for which addresses are valid.
        stall: SECOND * 75,
        startup_taint: given(taint)?,
        evict_older_pods,
        prove_after,
        proxies: proxies?,
    })
}

//! The kernel's part: made ready, attached, and asked who calls.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use tokio::time::sleep;
use tracing::warn;

use super::{
    Error,
    knowledge::Knowledge,
    listeners::{Listeners, target},
};
use crate::config::{Config, Identity};
use kiam_core::{
    blocking::{self, Blocking},
    pods::ClientResolver,
};
use kiam_kernel::{
    identity::{CgroupPaths, KernelResolver, Namespaces, SourceIpResolver},
    intercept::{self, Interception, Parts},
    pins::InUse,
    selftest::Witness,
};

/// How often it is looked which of several pods' cgroups has got a process.
const UNUSED: Duration = Duration::from_millis(200);

/// The programs at work, and the pods' cgroups below them.
pub(super) type Kernel = (Parts, CgroupPaths);

/// What is done before anything is asked; tells of what an agent with interceptor left to one without.
pub(super) async fn prepare(config: &Config) -> Result<Option<InUse>, Error> {
    match config.intercept.clone() {
        Some(config) => {
            let mut waits = false;
            loop {
                let config = config.clone();
                let prepare = move |token: &Blocking| intercept::prepare(token, &config);
                match blocking::spawn(prepare).await.map_err(|_| Error::Panicked)? {
                    Err(error @ intercept::Error::UnusedCgroups(_)) => {
                        if !std::mem::replace(&mut waits, true) {
                            warn!(%error, "Waiting for the first pod, which shows where the kubelet puts them");
                        }
                        sleep(UNUSED).await;
                    }
                    prepared => return Ok(Some(prepared?)),
                }
            }
        }
        None if intercept::is_installed(&config.bpffs) => warn!(
            bpffs = %config.bpffs.display(),
            "An earlier agent's kernel programs are still attached, and refuse pods from ten seconds after its end: take them away with kiam-agent uninstall"
        ),
        None => {}
    }
    Ok(None)
}

/// Loads and attaches the kernel programs, if there are to be any.
pub(super) async fn attach(
    config: &Config,
    listeners: &Listeners,
) -> Result<Option<Kernel>, Error> {
    let Some(config) = config.intercept.clone() else { return Ok(None) };
    let sockets = listeners.duplicates_for_pods().map_err(Error::Handover)?;
    let target = target(&listeners.pods());
    // Both block, for as long as the verifier takes.
    let panicked = |_| Error::Panicked;
    let load = move |token: &Blocking| Interception::load(token, &config, target);
    let loaded = blocking::spawn(load).await.map_err(panicked)??;
    if listeners.handover.as_ref().is_some_and(|handover| !handover.is_awaited()) {
        warn!("The agent that runs waits no more: it has ended, or finds out that this one serves");
    }
    let attach = move |token: &Blocking| {
        let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        loaded.attach(token, &sockets)
    };
    let parts = blocking::spawn(attach).await.map_err(panicked)??;
    let cgroups = CgroupPaths::new(parts.cgroup.clone());
    Ok(Some((parts, cgroups)))
}

/// How the agent knows whose a connection is that comes to the node's address.
pub(super) fn resolver(
    identity: Identity,
    kernel: Option<&Kernel>,
    knowledge: &Knowledge,
    witness: Witness,
) -> Arc<dyn ClientResolver> {
    match (identity, kernel) {
        (Identity::Kernel, Some((parts, cgroups))) => {
            let (flows, cgroups) = (parts.flows.clone(), cgroups.clone());
            let namespaces = parts.host_netns.map(|host| Namespaces {
                host,
                node: knowledge.node.clone(),
                pods: knowledge.pods.clone(),
                sandboxes: Arc::new(knowledge.paths.sandboxes.clone()),
            });
            Arc::new(KernelResolver::new(flows, cgroups, witness, namespaces))
        }
        _ => Arc::new(SourceIpResolver { witness }),
    }
}

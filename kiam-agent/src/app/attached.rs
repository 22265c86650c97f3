//! The third step: the kernel programs. From here on pods are intercepted; where no agent serves they are denied until this
//! one does.

use std::os::fd::{AsFd, BorrowedFd};

use kiam_common::redirect::Target;
use tracing::warn;

use super::{
    bound::Bound,
    error::Error,
    prepared::{Core, Interceptor, Service},
};
use crate::handover::{Listeners, Takeover};
use kiam_core::blocking::{self, Blocking};
use kiam_kernel::{
    identity::CgroupPaths,
    intercept::{self, Interception, InterceptionParts},
    pins::AgentLock,
};

/// An agent whose programs are attached.
pub(super) struct Attached {
    pub(super) core: Core,
    pub(super) kernel: Option<Kernel>,
    pub(super) service: Service,
    pub(super) listeners: Listeners,
    pub(super) takeover: Takeover,
}

/// The kernel's part, attached.
pub(super) struct Kernel {
    pub(super) config: intercept::Config,
    pub(super) agent_lock: AgentLock,
    pub(super) parts: InterceptionParts,
    /// The pods' cgroups below the programs.
    pub(super) cgroups: CgroupPaths,
}

// === impl Bound ===

impl Bound {
    /// Attaches the kernel programs, or replaces those of an earlier agent in place, if there is an interceptor.
    pub(super) async fn attach(self) -> Result<Attached, Error> {
        let Self { core, interceptor, service, listeners, takeover } = self;
        let kernel = match interceptor {
            None => None,
            Some(interceptor) => Some(attach(interceptor, &listeners, &takeover).await?),
        };
        Ok(Attached { core, kernel, service, listeners, takeover })
    }
}

async fn attach(
    interceptor: Interceptor,
    listeners: &Listeners,
    takeover: &Takeover,
) -> Result<Kernel, Error> {
    let Interceptor { config, agent_lock } = interceptor;
    let sockets = listeners.copies_for_pods()?;
    let target = Target::node_listeners(listeners.pod_addresses());
    // Both block, for as long as the verifier takes.
    let panicked = |_| intercept::Error::Panicked;
    let given = config.clone();
    let load = move |token: &Blocking| Interception::load(token, &given, target);
    let loaded = blocking::spawn(load).await.map_err(panicked)??;
    if takeover.handover.as_ref().is_some_and(|handover| !handover.is_awaited()) {
        warn!(
            "The other agent does not wait any more: it has ended, or will find that this one serves"
        );
    }
    let attach = move |token: &Blocking| {
        let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        loaded.attach(token, &sockets)
    };
    let parts = blocking::spawn(attach).await.map_err(panicked)??;
    let cgroups = CgroupPaths::new(parts.cgroup.clone());
    Ok(Kernel { config, agent_lock, parts, cgroups })
}

//! The last step: the agent before this one is superseded, and the next one can find this one.

use std::{
    mem::take,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use tracing::info;

use super::{error::Error, guarded::Guarded, prepared::Core, running::App};
use crate::{
    admin::{self, Surface},
    handover::{self, Departure, HandoverContent, OperatorSockets, StandingOffer, Takeover},
};
use kiam_kernel::sys;

// === impl Guarded ===

impl Guarded {
    /// Waits for the next agent from now on, lets `admin.sock` lead to this one, and supersedes the agent before it.
    pub(super) async fn take_over(self) -> Result<App, Error> {
        let Self { mut core, takeover, reassert, republish, open, alone, .. } = self;
        let Takeover { handover, lock, spare, unfiltered, .. } = takeover;
        if handover.is_some() {
            // That agent listens inside pods that have come since it passed its sockets, and will not for long.
            open.cover_table().await;
        }
        let departure = Departure::new(core.end.grace_period);
        let (credentials, stays) = (core.knowledge.credentials.clone(), departure.clone());
        let assets = HandoverContent {
            sockets: Box::new(move || open.copies_with(&spare)),
            credentials: Box::new(move || credentials.bequeath()),
            stays: Box::new(move || !stays.is_near()),
        };
        let failed = Error::state(&core.state_dir, handover::SOCKET);
        let (programs, listeners) = (reassert.clone(), republish.clone());
        let abandoned = move || {
            programs.notify_one();
            listeners.notify_one();
        };
        let offer = StandingOffer::make(&core.peers, assets, abandoned).map_err(failed)?;
        let admin = operate(&mut core, self.operator_sockets)?;
        if let Some(handover) = handover {
            if !handover.taken().await {
                // It may have attached its own programs again before it heard.
                reassert.notify_one();
            }
            republish.notify_one();
        }
        alone.notify_one();
        // From now on the next agent finds this one.
        drop(lock);
        // Not before: until then the other agent might have had to go on.
        let unfilter = |socket: &OwnedFd| sys::unfilter(socket.as_fd());
        unfiltered.iter().try_for_each(unfilter).map_err(handover::Error::Copies)?;
        info!(pods = ?self.pods, %admin, "Listening");
        let Core { process, operators, .. } = core;
        Ok(App::new(process, operators, offer, departure, self.detach))
    }
}

/// Answers operators over TCP, which is the serving agent's, and lets `admin.sock` lead to this process.
fn operate(core: &mut Core, sockets: OperatorSockets) -> Result<SocketAddr, Error> {
    let unnamed =
        |source| handover::Error::Bind { flag: "--admin", address: "bound".to_owned(), source };
    let address = sockets.admin.local_addr().map_err(unnamed)?;
    // Set once, here: every part has registered its metrics.
    let _ = core.operations.registry.set(take(&mut core.process.registry));
    let sockets = [(Some(sockets.admin), Surface::Status), (sockets.metrics, Surface::Metrics)];
    for (socket, surface) in sockets {
        if let Some(socket) = socket {
            let (operations, drain) = (Arc::clone(&core.operations), core.process.drain.clone());
            core.process.spawn(admin::serve_tcp(socket, surface, operations, drain));
        }
    }
    core.socket.link().map_err(Error::state(&core.state_dir, admin::SOCKET))?;
    Ok(address)
}

//! What has to be done again and again for the kernel's part.

use tracing::error;

use crate::{
    intercept::{Lease, Parts},
    lifecycle::{Drain, Latch},
};

/// Renews the lease while the agent lives, and ends the lease when it drains.
pub(super) async fn keep_lease(parts: Parts, attached: Latch, mut drain: Drain) {
    let Parts { mut lease, flows, mut log, .. } = parts;
    let mut ticks = tokio::time::interval(Lease::RENEWAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut count = 0_u32;
    loop {
        tokio::select! {
            _ = ticks.tick() => match lease.renew() {
                Ok(()) => attached.set(),
                Err(failure) => {
                    attached.clear();
                    error!(error = %failure, "Lease not renewed: the kernel denies pods' IMDS traffic");
                }
            },
            () = drain.started() => break,
        }
        if let Some(log) = &mut log {
            log.flush();
        }
        count = count.wrapping_add(1);
        if count.is_multiple_of(60) {
            flows.sweep();
        }
    }
    attached.clear();
    if let Err(failure) = lease.end() {
        error!(error = %failure, "Lease not ended; it runs out by itself");
    }
}

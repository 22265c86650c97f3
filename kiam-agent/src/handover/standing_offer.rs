//! Waits for the agent after this one.

use std::{io, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tracing::warn;

use super::{HandoverContent, Offer, OfferEnd, Peers};
use kiam_core::lifecycle::{DrainSignal, drain};

/// How long the end waits for a successor that has the sockets to say that it serves.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(5);
/// How long before the limit of the drain that ends, so that open connections have some time.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// The standing offer to the agent after this one.
pub struct StandingOffer {
    withdraw: DrainSignal,
    /// `None` once the offer has ended.
    offer: Option<JoinHandle<OfferEnd>>,
}

// === impl StandingOffer ===

impl StandingOffer {
    /// Offers `assets` from now on. `abandoned` is called when a successor gave up half way.
    ///
    /// # Errors
    ///
    /// The socket can't be listened at.
    pub fn make(
        peers: &Peers,
        assets: HandoverContent,
        abandoned: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let offer = Offer::bind(&peers.state_dir)?;
        let (withdraw, withdrawn) = drain();
        let offer = tokio::spawn(offer.stand(assets, peers.trusted.clone(), abandoned, withdrawn));
        Ok(Self { withdraw, offer: Some(offer) })
    }

    /// Returns once an agent has taken over, with whether it has the sockets; never, when the offer ended otherwise.
    pub async fn took_over(&mut self) -> bool {
        if let Some(offer) = &mut self.offer {
            let ended = offer.await;
            self.offer = None;
            if let Ok(OfferEnd::Taken { queue }) = ended {
                return queue;
            }
        }
        std::future::pending().await
    }

    /// Withdraws the offer. A successor that was about to take over may still do so, as [`Self::took_over`] says, but not
    /// so late that nothing would be left until the `limit` of the drain.
    pub async fn finish(&mut self, limit: Option<Instant>) -> Option<bool> {
        self.withdraw.start();
        let mut offer = self.offer.take()?;
        let usual = Instant::now() + EXCHANGE_DEADLINE;
        let deadline = limit.map_or(usual, |limit| usual.min(limit - LAST_REQUESTS));
        let ended = timeout_at(deadline, &mut offer).await;
        offer.abort();
        match ended {
            Ok(Ok(OfferEnd::Taken { queue })) => Some(queue),
            Ok(_) => None,
            Err(_) => {
                warn!(
                    "An agent has the sockets and may serve at any moment: the lease and the kernel programs are left to it"
                );
                Some(false)
            }
        }
    }
}

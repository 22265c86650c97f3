//! Counts and logs connections and requests that exceed an owner's share.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tracing::warn;

use super::{Metrics, Owner, PodService, metrics::Rejection};
use kiam_core::{
    pods::{Client, Unattested},
    telemetry::LogLimit,
};

/// The shortest time between two equal log lines about one owner.
const LOG_PERIOD: Duration = Duration::from_secs(10);

pub(super) struct Report<S> {
    service: Arc<S>,
    metrics: Metrics,
    log: LogLimit<(Option<Owner>, Rejection)>,
}

// === impl Report ===

impl<S: PodService> Report<S> {
    pub(super) fn new(service: Arc<S>, metrics: Metrics) -> Self {
        Self { service, metrics, log: LogLimit::new(LOG_PERIOD) }
    }

    /// Reports a rejected connection or request of `client` at `peer`; `None` if the client was not resolved.
    pub(super) fn rejected(
        &self,
        rejected: Rejection,
        client: Option<&Result<Client, Unattested>>,
        peer: SocketAddr,
    ) {
        self.metrics.rejected(rejected);
        let owner = client.map(Owner::of);
        let Some(left_out) = self.log.admit((owner.clone(), rejected)) else { return };
        let pod = match client {
            Some(Ok(client) | Err(Unattested::Unknown { client, .. })) => self.service.pod(client),
            _ => None,
        };
        let what = rejected.what();
        warn!(
            pod.namespace = pod.as_ref().map(|pod| &*pod.namespace),
            pod.name = pod.as_ref().map(|pod| &*pod.name),
            pod.ip = %peer.ip(),
            ?owner,
            left_out,
            "{what}"
        );
    }
}

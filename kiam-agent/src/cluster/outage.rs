//! Reports outages of the API server: when one begins, when it lasts, and when it ends.
//!
//! Unlike failing TLS, an outage does not end readiness: the agent continues with its records, and a recreated agent
//! would have none.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{
    failure::{Failure, WatchEnd},
    metrics::{Metrics, RequestKind, Resource},
};
use kiam_core::lifecycle::{Detail, Readiness};

/// When an outage is reported as lasting. A server that is being upgraded is back sooner.
const LASTING: Duration = Duration::from_secs(60);

/// The state of one kind's lists, or its watches.
#[derive(Debug)]
pub(super) struct Outage {
    resource: Resource,
    ask: RequestKind,
    /// 1 while they fail.
    failing: Gauge,
    /// The error, once the outage has lasted.
    problem: Detail,
    since: Mutex<Option<OutageState>>,
    /// Whether the last watch ended before it worked.
    barren: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct OutageState {
    begun: Instant,
    reported: bool,
}

// === impl Outage ===

impl Outage {
    pub(super) fn new(
        resource: Resource,
        ask: RequestKind,
        metrics: &Metrics,
        readiness: &Readiness,
    ) -> Self {
        let failing = metrics.failing(resource, ask);
        let problem = readiness.detail(name(resource, ask));
        let (since, barren) = (Mutex::default(), AtomicBool::default());
        Self { resource, ask, failing, problem, since, barren }
    }

    /// A watch ended; whether it worked before. One that a server ends at once because it is restarted, or because the
    /// history since the last one is gone, is ordinary: the second in a row is a failure.
    pub(super) fn ended(&self, end: &WatchEnd, works: bool) {
        let again = self.barren.swap(!works, Relaxed) && !works;
        match end {
            WatchEnd::Failed(error) => self.failed(error),
            WatchEnd::Unopened(time) => self.failed(&Failure::Timeout(*time)),
            WatchEnd::Closed if again => self.failed(&Failure::Ends),
            WatchEnd::Expired if again => self.failed(&Failure::Expires),
            WatchEnd::Closed | WatchEnd::Expired | WatchEnd::Rewound | WatchEnd::Stalled => {}
        }
    }

    /// Records a failed request.
    pub(super) fn failed(&self, error: &dyn std::error::Error) {
        let Self { resource, ask, .. } = self;
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = since.as_mut() else {
            *since = Some(OutageState { begun: Instant::now(), reported: false });
            self.failing.set(1);
            warn!(?resource, request = ?ask, %error, "Requests to the Kubernetes API fail; continuing with the known records");
            return;
        };
        if known.begun.elapsed() < LASTING {
            debug!(?resource, request = ?ask, %error, "Requests to the Kubernetes API still fail");
            return;
        }
        self.problem.set(format!("fails, continuing with the known records: {error}"));
        if !known.reported {
            known.reported = true;
            let seconds = known.begun.elapsed().as_secs();
            warn!(
                ?resource, request = ?ask, outage.seconds = seconds, %error,
                "Requests to the Kubernetes API keep failing; changes there are not seen"
            );
        }
    }

    /// Records that the server answered.
    pub(super) fn over(&self) {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(OutageState { begun, .. }) = since {
            self.failing.set(0);
            self.problem.clear();
            let (resource, ask, seconds) = (self.resource, self.ask, begun.elapsed().as_secs());
            info!(?resource, request = ?ask, outage.seconds = seconds, "Requests to the Kubernetes API succeed again");
        }
    }
}

/// The name in `/ready`.
fn name(resource: Resource, ask: RequestKind) -> &'static str {
    match (resource, ask) {
        (Resource::Pods, RequestKind::List) => "Kubernetes API, list of pods",
        (Resource::Pods, RequestKind::Watch) => "Kubernetes API, watch of pods",
        (Resource::Namespaces, RequestKind::List) => "Kubernetes API, list of namespaces",
        (Resource::Namespaces, RequestKind::Watch) => "Kubernetes API, watch of namespaces",
        (Resource::ServiceAccounts, RequestKind::List) => {
            "Kubernetes API, list of service accounts"
        }
        (Resource::ServiceAccounts, RequestKind::Watch) => {
            "Kubernetes API, watch of service accounts"
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use prometheus_client::registry::Registry;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_fails_for_long_is_shown_with_its_reason_until_it_is_over_and_stays_ready() {
        let (readiness, mut registry) = (Readiness::default(), Registry::default());
        let metrics = Metrics::register(&mut registry);
        let outage = Outage::new(Resource::Pods, RequestKind::List, &metrics, &readiness);
        let failing = || metrics.failing(Resource::Pods, RequestKind::List).get();
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert_eq!(failing(), 0);
        outage.failed(&refused);
        tokio::time::advance(LASTING - Duration::from_secs(1)).await;
        outage.failed(&refused);
        assert!(failing() == 1 && readiness.details().is_empty(), "not for long");
        tokio::time::advance(Duration::from_secs(1)).await;
        outage.failed(&refused);
        let [(name, why)] = &readiness.details()[..] else { panic!("{:?}", readiness.details()) };
        assert!(*name == "Kubernetes API, list of pods" && why.contains("connection refused"));
        assert!(readiness.is_ready(), "what is known is served on");
        outage.over();
        assert!(failing() == 0 && readiness.details().is_empty());
    }
}

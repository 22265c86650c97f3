//! Builds the parts that know pods, policy and credentials, and what feeds them.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{error::Error, process::Process};
use crate::{
    cluster::{self, Cluster, EventParts, EvictionParts, SyncLatches},
    config::Config,
    handover::{FirstPass, Peers},
    observe::Sightings,
    older_pods::Exposure,
    pod_listeners::Paths,
    sts,
};
use kiam_core::{
    credentials::{self, CredentialReader, CredentialSource, Prefetcher, Refresher},
    lifecycle::Latch,
    pods::{self, NodePods, PodIndex, PodReader, PodUid},
    policy::{RolePolicy, publish_wanted, report_sessions},
    role::WantedRoles,
};
use kiam_kernel::identity::InterfaceAddresses;
use kiam_requests::imds;

/// The time between two checks of what is to be reported by Events.
const EVENTS: Duration = Duration::from_secs(5);

/// The time between two evictions.
const EVICTIONS: Duration = Duration::from_secs(10);

/// The parts that answer questions about pods.
#[derive(Clone)]
pub(super) struct Knowledge {
    pub(super) pods: PodReader,
    pub(super) node_pods: NodePods,
    pub(super) policy: RolePolicy,
    pub(super) credentials: CredentialReader,
    pub(super) refresher: Refresher,
    pub(super) sightings: Sightings,
    pub(super) paths: Paths,
    pub(super) exposure: Exposure,
    /// The node's addresses.
    pub(super) node: Arc<InterfaceAddresses>,
    pub(super) journal: imds::Journal,
}

// === impl Knowledge ===

impl Knowledge {
    /// Pods, policy and credentials, fed from now on; and what must be known before pods are served.
    pub(super) async fn start(
        process: &mut Process,
        config: &Config,
        upstream: &imds::Upstream,
        peers: &Peers,
    ) -> Result<(Self, FirstPass), Error> {
        let node = Arc::new(InterfaceAddresses::default());
        let (index, pods) = PodIndex::with(pods::Config {
            static_pod_namespaces: config.static_pod_namespaces.clone(),
            node: node.clone(),
        });
        let node_pods = config.node_pods();
        let exposure = Exposure::new(config.entitlement());
        let cluster = Cluster::new(config.cluster.clone(), &process.readiness)?;
        let synced = SyncLatches::new(&process.readiness, config.sts.source);
        let latches = synced.all();
        let metrics = cluster::Metrics::register(&mut process.registry);
        let events = cluster.events(&metrics);
        evict(process, &cluster, &metrics, eviction_parts(&pods, node_pods, &exposure));
        if let Some(taint) = cluster.startup_taint() {
            let removed = taint.remove_once_ready(process.readiness.clone());
            process.spawn_apart("startup taint", removed);
        }
        let first_credentials = process.readiness.latch("first credentials");
        let region = config.region(upstream).await?;
        let base = config.base_arn(upstream, &region).await?;
        let policy = RolePolicy::new(config.policy(base), pods.clone());
        let identity = config.sts.token_kubeconfig.clone();
        let tokens = cluster.tokens(config.sts.source, identity, pods.clone(), metrics.clone())?;
        let source = sts::source(&config.sts(region), process.clock.clone(), tokens).await?;
        process.spawn(cluster.run(index, pods.clone(), synced, metrics, process.drain.clone()));
        let (wanted, receiver) = watch::channel(WantedRoles::default());
        if config.roles.policy.varies() {
            process.spawn_apart("sessions", report_sessions(receiver.clone()));
        }
        let parts = prefetch_parts(process, source, &pods, receiver, first_credentials.clone());
        let (prefetcher, credentials) = Prefetcher::new(config.credentials, parts);
        credentials::Metrics::register_states(&mut process.registry, credentials.clone());
        let knowledge = Self {
            pods,
            node_pods,
            policy,
            refresher: prefetcher.refresher(),
            sightings: Sightings::default(),
            paths: Paths::default(),
            exposure,
            node,
            journal: imds::Journal::default(),
            credentials,
        };
        let parts = knowledge.event_parts(process, !config.observes());
        report_by_events(process, events, parts, latches.clone());
        knowledge.prefetch(process, prefetcher, wanted, latches.clone(), peers.clone());
        let (readiness, credentials) = (process.readiness.clone(), knowledge.credentials.clone());
        let first_pass = FirstPass { known: latches, first_credentials, readiness, credentials };
        Ok((knowledge, first_pass))
    }

    /// Publishes what is wanted, and prefetches it. Published only once all `kinds` are known, so that the first set is the
    /// whole one.
    fn prefetch(
        &self,
        process: &mut Process,
        mut prefetcher: Prefetcher,
        wanted: watch::Sender<WantedRoles>,
        kinds: Vec<Latch>,
        peers: Peers,
    ) {
        let (node_pods, mut drain) = (self.node_pods, process.drain.clone());
        let publish =
            publish_wanted(self.policy.clone(), node_pods.filter(), wanted, drain.clone());
        let readiness = process.readiness.clone();
        process.spawn(async move {
            tokio::select! {
                () = readiness.wait_for(&kinds) => {}
                () = drain.started() => return,
            }
            // As late as that, so that it is as fresh as can be.
            prefetcher.inherit(peers.credentials().await);
            // Polled in this order: the prefetcher's first scan must not be of a set that is empty yet.
            tokio::join!(biased; publish, prefetcher.run(drain));
        });
    }

    /// What Events report.
    fn event_parts(&self, process: &Process, send: bool) -> EventParts {
        let exposure = self.exposure.clone();
        EventParts {
            pods: self.pods.clone(),
            serves: Box::new(self.node_pods.filter()),
            policy: self.policy.clone(),
            credentials: self.credentials.clone(),
            exposed: Box::new(move |pod| exposure.of(pod)),
            clock: process.clock.clone(),
            period: EVENTS,
            send,
        }
    }
}

/// Evicts pods that may hold the node's credentials from now on, if that is configured.
fn evict(
    process: &mut Process,
    cluster: &Cluster,
    metrics: &cluster::Metrics,
    parts: EvictionParts,
) {
    if let Some(evictions) = cluster.evictions(metrics) {
        process.spawn_apart("evictions", evictions.run(parts, process.drain.clone()));
    }
}

fn eviction_parts(pods: &PodReader, node_pods: NodePods, exposure: &Exposure) -> EvictionParts {
    let exposure = exposure.clone();
    EvictionParts {
        pods: pods.clone(),
        // Not a pod whose age is unknown.
        is_due: Box::new(move |pod| node_pods.includes(pod) && exposure.is_certain(pod)),
        pace: EVICTIONS,
    }
}

/// What the prefetcher works with.
fn prefetch_parts(
    process: &mut Process,
    source: Arc<dyn CredentialSource>,
    pods: &PodReader,
    wanted: watch::Receiver<WantedRoles>,
    first_pass: Latch,
) -> credentials::PrefetcherParts {
    let (watched, known) = (pods.clone(), pods.clone());
    credentials::PrefetcherParts {
        source,
        render: imds::wire::render,
        clock: process.clock.clone(),
        wanted,
        silence: Box::new(move || watched.silence()),
        names: Box::new(move |claimant| {
            let uid = PodUid::new(&claimant.pod);
            known.by_uid(&uid).map(|pod| pod.name.clone()).ok()
        }),
        metrics: credentials::Metrics::register(&mut process.registry, process.statsd.clone()),
        first_pass,
    }
}

/// Reports what is wrong by Events from now on. A part that the agent can do without: whatever becomes of Events, credentials
/// are kept. It waits for all `kinds`: before, a role that a ServiceAccount names seems to be missing.
fn report_by_events(
    process: &mut Process,
    events: cluster::Events,
    parts: EventParts,
    kinds: Vec<Latch>,
) {
    let (readiness, drain) = (process.readiness.clone(), process.drain.clone());
    process.spawn_apart("events", async move {
        readiness.wait_for(&kinds).await;
        events.run(parts, drain).await;
    });
}

//! Builds the parts that know pods, policy and credentials, and what feeds them.

use std::{net::IpAddr, sync::Arc, time::Duration};

use tokio::sync::watch;
use tracing::info;

use super::{
    error::Error,
    process::Process,
    upstream::{policy_config, region, sts_config},
    warm_up::FirstPass,
};
use crate::{
    cluster::{self, Cluster, EventParts, EvictionParts, SyncLatches},
    config::{Config, Hosts},
    handover::Peers,
    imds,
    observe::Sightings,
    older_pods::{Entitlement, Exposure},
    pod_listeners::Paths,
    sts,
};
use kiam_core::{
    credentials::{self, CredentialReader, CredentialSource, PodTokens, Prefetcher, Refresher},
    lifecycle::{Latch, Readiness},
    pods::{self, Pod, PodIndex, PodReader, PodUid},
    policy::{RolePolicy, publish_wanted},
    role::{Sessions, Source, WantedRoles},
};
use kiam_kernel::{
    identity::InterfaceAddresses,
    intercept::{self, HostNetworkPods},
};

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

/// Which pods are this node's: with `--node-name` all that are watched, otherwise those of its addresses.
#[derive(Clone, Copy)]
pub(super) struct NodePods {
    by_node: bool,
    hosts: Hosts,
}

/// The kinds of objects that must have been listed before it is known what pods want.
pub(super) struct Kinds {
    pub(super) synced: SyncLatches,
    pub(super) latches: Vec<Latch>,
}

// === impl NodePods ===

impl NodePods {
    pub(super) fn new(config: &Config) -> Self {
        Self { by_node: config.cluster.node_name.is_some(), hosts: config.hosts }
    }

    fn includes(self, pod: &Pod) -> bool {
        self.by_node
            || match pod.host_ip {
                Some(IpAddr::V4(address)) => self.hosts.v4 == Some(address),
                Some(IpAddr::V6(address)) => self.hosts.v6 == Some(address),
                None => false,
            }
    }

    pub(super) fn filter(self) -> impl Fn(&Pod) -> bool + Send + Sync + 'static {
        move |pod| self.includes(pod)
    }
}

// === impl Kinds ===

impl Kinds {
    /// ServiceAccounts are needed only where they vouch for pods.
    pub(super) fn new(readiness: &Readiness, source: Source) -> Self {
        let synced = SyncLatches {
            pods: readiness.latch("pods"),
            namespaces: readiness.latch("namespaces"),
            service_accounts: (source == Source::WebIdentity)
                .then(|| readiness.latch("service accounts")),
        };
        let latches =
            [&synced.pods, &synced.namespaces].into_iter().chain(&synced.service_accounts);
        Self { latches: latches.cloned().collect(), synced }
    }
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
        let node_pods = NodePods::new(config);
        let exposure = Exposure::new(entitlement(config));
        let cluster = Cluster::new(config.cluster.clone(), &process.readiness)?;
        let Kinds { synced, latches } = Kinds::new(&process.readiness, config.sts.source);
        let metrics = cluster::Metrics::register(&mut process.registry);
        let events = cluster.events(&metrics);
        evict(process, &cluster, &metrics, eviction_parts(&pods, node_pods, &exposure));
        remove_startup_taint(process, &cluster);
        let first_credentials = process.readiness.latch("first credentials");
        let region = region(config, upstream).await?;
        let policy = policy_config(config, upstream, &region).await?;
        let policy = RolePolicy::new(policy, pods.clone());
        let tokens = tokens(config, &cluster, &pods, &metrics)?;
        let sts = sts_config(config, region);
        let source = sts::source(&sts, process.clock.clone(), tokens).await?;
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

/// Removes the taint that keeps pods from the node, once the agent is ready.
fn remove_startup_taint(process: &mut Process, cluster: &Cluster) {
    let Some(taint) = cluster.startup_taint() else { return };
    let (readiness, shown) = (process.readiness.clone(), process.readiness.detail("startup taint"));
    process.spawn_apart("startup taint", async move {
        readiness.ready().await;
        taint.remove(shown).await;
    });
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

/// The source of tokens of the pods' own, if those are what STS is shown.
pub(super) fn tokens(
    config: &Config,
    cluster: &Cluster,
    pods: &PodReader,
    metrics: &cluster::Metrics,
) -> Result<Option<Arc<dyn PodTokens>>, Error> {
    if config.sts.source == Source::Node {
        return Ok(None);
    }
    let identity = config.sts.token_kubeconfig.clone();
    Ok(Some(Arc::new(cluster.tokens(identity, pods.clone(), metrics.clone())?)))
}

/// The pods that get the node's credentials by the flags.
fn entitlement(config: &Config) -> Entitlement {
    let passes = |it: &intercept::Config| it.host_network == HostNetworkPods::Pass;
    Entitlement {
        passes_host_network: config.intercept.as_ref().is_some_and(passes),
        node_roles: config.imds.node_roles.clone(),
    }
}

/// Logs what sessions of the pods' own cost, once it is known what is wanted.
async fn report_sessions(mut wanted: watch::Receiver<WantedRoles>) {
    if let Ok(first) = wanted.wait_for(|wanted| !wanted.is_empty()).await {
        info!(
            "Session names, source identities or tags are the pods' own: {}",
            Sessions::of(&first)
        );
    }
}

//! The parts that answer questions about pods, and what feeds them.

use std::{
    future::pending, net::IpAddr, panic::AssertUnwindSafe, path::Path, sync::Arc, time::Duration,
};

use futures::FutureExt as _;
use tokio::{sync::watch, time::sleep};
use tracing::{error, info, warn};

use super::{
    Error,
    build::Common,
    listeners::trusted,
    upstream::{policy_config, region, sts_config},
    warm_up::complete,
};
use crate::{
    cluster::{self, Cluster, Events, EvictionParts, Evictions, SyncLatches},
    config::{Config, Hosts},
    handover::{self, PeerJudge},
    imds,
    observe::Sightings,
    older_pods::{Entitlement, Exposure},
    pod_listeners::Paths,
    sts,
};
use kiam_core::{
    credentials::{
        self, CredentialReader, CredentialSource, Inheritance, PodTokens, Prefetcher, Refresher,
    },
    lifecycle::{Drain, Latch},
    pods::{self, Pod, PodIndex, PodReader, PodUid},
    policy::{RolePolicy, publish_wanted},
    role::{Sessions, Source, WantedRoles},
};
use kiam_kernel::{
    identity::InterfaceAddresses,
    intercept::{self, HostNetworkPods},
};

/// What must have been listed before it is known what pods want.
const KINDS: [&str; 3] = ["pods", "namespaces", "service accounts"];

/// How often it is looked whether the agent is ready.
const READY: Duration = Duration::from_millis(100);

/// How often what there is to tell by Events is looked for.
const EVENTS: Duration = Duration::from_secs(3);

/// The time between two evictions.
const EVICTIONS: Duration = Duration::from_secs(10);

/// The parts that answer questions about pods.
#[derive(Clone)]
pub(super) struct Knowledge {
    pub(super) pods: PodReader,
    pub(super) policy: RolePolicy,
    pub(super) credentials: CredentialReader,
    pub(super) refresher: Refresher,
    pub(super) sightings: Sightings,
    pub(super) paths: Paths,
    /// Pods that ran before the kernel programs were attached.
    pub(super) exposure: Exposure,
    /// The node's addresses.
    pub(super) node: Arc<InterfaceAddresses>,
    pub(super) journal: imds::Journal,
}

// === impl Common ===

impl Common {
    /// Pods, policy and credentials, fed from now on.
    pub(super) async fn knowledge(
        &mut self,
        config: &Config,
        upstream: &imds::Upstream,
    ) -> Result<Knowledge, Error> {
        let node = Arc::new(InterfaceAddresses::default());
        let (index, pods) = PodIndex::with(pods::Config {
            static_pod_namespaces: config.static_pod_namespaces.clone(),
            node: node.clone(),
        });
        let cluster = Cluster::new(config.cluster.clone(), &self.readiness)?;
        let synced = SyncLatches {
            pods: self.readiness.latch("pods"),
            namespaces: self.readiness.latch("namespaces"),
            service_accounts: (config.sts.source == Source::WebIdentity)
                .then(|| self.readiness.latch("service accounts")),
        };
        let metrics = cluster::Metrics::register(&mut self.registry);
        let events = cluster.events(&metrics);
        let exposure = Exposure::default();
        self.evict(cluster.evictions(&metrics), config, (&pods, &exposure));
        self.startup_taint(&cluster);
        let first = self.readiness.latch("first credentials");
        let region = region(config, upstream).await?;
        let policy = policy_config(config, upstream, &region).await?;
        let policy = RolePolicy::new(policy, pods.clone());
        let tokens = tokens(config, &cluster, &pods, &metrics)?;
        let source = sts::source(&sts_config(config, region), self.clock.clone(), tokens).await?;
        let feeds = cluster.run(index, pods.clone(), synced, metrics, self.drain.clone());
        self.tasks.spawn(feeds);
        let (wanted, receiver) = watch::channel(WantedRoles::default());
        let (mut prefetcher, credentials) =
            self.prefetcher(config, source, (&pods, receiver), first);
        let refresher = prefetcher.refresher();
        let serves = served(config.cluster.node_name.is_some(), config.hosts);
        let told = self.told(config, (&pods, &policy, &credentials), exposure.clone());
        let publish = publish_wanted(policy.clone(), serves, wanted, self.drain.clone());
        self.events(events, told);
        // Published only once all kinds are known, so that the first set is the whole one.
        let (readiness, mut drain) = (self.readiness.clone(), self.drain.clone());
        let (state_dir, trusted) = (config.state_dir.clone(), trusted(config));
        self.tasks.spawn(async move {
            tokio::select! {
                () = complete(&readiness, &KINDS) => {}
                () = drain.started() => return,
            }
            // As late as that, so that it is as fresh as can be.
            prefetcher.inherit(inherited(&state_dir, &trusted).await);
            // Polled in this order: the prefetcher's first look must not be at a set that is empty yet.
            tokio::join!(biased; publish, prefetcher.run(drain));
        });
        Ok(Knowledge {
            pods,
            policy,
            credentials,
            refresher,
            sightings: Sightings::default(),
            paths: Paths::default(),
            exposure,
            node,
            journal: imds::Journal::default(),
        })
    }

    /// Takes the taint off that keeps pods from the node, once the agent is ready.
    fn startup_taint(&mut self, cluster: &Cluster) {
        let Some(taint) = cluster.startup_taint() else { return };
        let (readiness, shown) = (self.readiness.clone(), self.readiness.detail("startup taint"));
        let removed = async move {
            while !readiness.is_ready() {
                sleep(READY).await;
            }
            taint.remove(shown).await;
        };
        self.tasks.spawn(apart("startup taint", removed, self.drain.clone()));
    }

    /// Evicts pods that may hold the node's credentials from now on, if that is asked for.
    fn evict(
        &mut self,
        evictions: Option<Evictions>,
        config: &Config,
        (pods, exposure): (&PodReader, &Exposure),
    ) {
        let Some(evictions) = evictions else { return };
        let (exposure, entitlement) = (exposure.clone(), entitlement(config));
        let serves = served(config.cluster.node_name.is_some(), config.hosts);
        let parts = EvictionParts {
            pods: pods.clone(),
            is_due: Box::new(move |pod| {
                serves(pod) && entitlement.of(pod).is_none() && exposure.until(pod).is_some()
            }),
            pace: EVICTIONS,
        };
        let evicts = evictions.run(parts, self.drain.clone());
        self.tasks.spawn(apart("evictions", evicts, self.drain.clone()));
    }

    /// What keeps credentials of what is `wanted`, and the reader of them.
    fn prefetcher(
        &mut self,
        config: &Config,
        source: Arc<dyn CredentialSource>,
        (pods, wanted): (&PodReader, watch::Receiver<WantedRoles>),
        first_pass: Latch,
    ) -> (Prefetcher, CredentialReader) {
        if config.roles.vary() {
            self.tasks.spawn(apart("sessions", tell_sessions(wanted.clone()), self.drain.clone()));
        }
        let (watched, known) = (pods.clone(), pods.clone());
        let parts = credentials::PrefetcherParts {
            source,
            render: imds::wire::render,
            clock: self.clock.clone(),
            wanted,
            silence: Box::new(move || watched.silence()),
            names: Box::new(move |claimant| {
                let uid = PodUid::new(&claimant.pod);
                known.by_uid(&uid).map(|pod| pod.name.clone()).ok()
            }),
            metrics: credentials::Metrics::register(&mut self.registry, self.statsd.clone()),
            first_pass,
        };
        let (prefetcher, credentials) = Prefetcher::new(config.credentials, parts);
        self.registry
            .register_collector(Box::new(credentials::CredentialStates::new(credentials.clone())));
        (prefetcher, credentials)
    }

    /// Tells by Events of what is wrong from now on.
    fn events(&mut self, events: Events, told: cluster::EventParts) {
        // A task of its own: whatever becomes of Events, credentials are kept. Only once all kinds are known, too: before,
        // a role that a ServiceAccount names seems to be missing.
        let (readiness, drain) = (self.readiness.clone(), self.drain.clone());
        self.tasks.spawn(async move {
            let told = async {
                complete(&readiness, &KINDS).await;
                events.run(told, drain.clone()).await;
            };
            apart("events", told, drain.clone()).await;
        });
    }

    /// What there is to tell by Events.
    fn told(
        &self,
        config: &Config,
        (pods, policy, credentials): (&PodReader, &RolePolicy, &CredentialReader),
        exposure: Exposure,
    ) -> cluster::EventParts {
        let entitlement = entitlement(config);
        cluster::EventParts {
            pods: pods.clone(),
            serves: Box::new(served(config.cluster.node_name.is_some(), config.hosts)),
            policy: policy.clone(),
            credentials: credentials.clone(),
            exposed: Box::new(move |pod| {
                exposure.until(pod).filter(|_| entitlement.of(pod).is_none())
            }),
            clock: self.clock.clone(),
            period: EVENTS,
            send: !config.observes(),
        }
    }
}

/// The source of tokens of the pods' own, if those are what STS is shown.
fn tokens(
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
pub(super) fn entitlement(config: &Config) -> Entitlement {
    let passes = |it: &intercept::Config| it.host_network == HostNetworkPods::Pass;
    Entitlement {
        passes_host_network: config.intercept.as_ref().is_some_and(passes),
        node_roles: config.imds.node_roles.clone(),
    }
}

/// What the agent that runs holds. Whatever is odd about it, nothing is lost but calls to STS.
async fn inherited(state_dir: &Path, trusted: &PeerJudge) -> Inheritance {
    let Some(held) = handover::credentials(state_dir, trusted).await else {
        return Inheritance::default();
    };
    Inheritance::read(&held).unwrap_or_else(|error| {
        warn!(%error, "What the agent that runs holds is of no use; asking STS for all of it");
        Inheritance::default()
    })
}

/// Says what sessions of the pods' own cost, once it is known what is wanted.
async fn tell_sessions(mut wanted: watch::Receiver<WantedRoles>) {
    if let Ok(first) = wanted.wait_for(|wanted| !wanted.is_empty()).await {
        info!(
            "Session names, source identities or tags are the pods' own: {}",
            Sessions::of(&first)
        );
    }
}

/// Does `work`, of which nothing else depends, until the drain begins: the agent goes on when it ends, or panics.
async fn apart(part: &'static str, work: impl Future<Output = ()>, mut drain: Drain) {
    let work = async {
        if AssertUnwindSafe(work).catch_unwind().await.is_err() {
            error!(part, "A part panicked, which is a bug of the agent; going on without it");
        }
        pending::<()>().await;
    };
    tokio::select! {
        () = work => {}
        () = drain.started() => {}
    }
}

/// Whether a pod is this node's: with a node's name all that are watched are, else those of this host.
pub(super) fn served(by_node: bool, hosts: Hosts) -> impl Fn(&Pod) -> bool {
    move |pod| {
        by_node
            || match pod.host_ip {
                Some(IpAddr::V4(address)) => hosts.v4 == Some(address),
                Some(IpAddr::V6(address)) => hosts.v6 == Some(address),
                None => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiam_core::lifecycle;

    #[tokio::test(start_paused = true)]
    async fn what_ends_or_panics_apart_is_no_end_of_the_agent() {
        let (signal, drain) = lifecycle::drain();
        let panics = apart("panics", async { std::panic::panic_any(()) }, drain.clone());
        let ends = apart("ends", async {}, drain.clone());
        let goes_on = apart("goes on", pending(), drain);
        let mut all = Box::pin(async { tokio::join!(panics, ends, goes_on) });
        let hour = Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, &mut all).await.is_err());
        signal.start();
        assert!(tokio::time::timeout(hour, all).await.is_ok());
    }
}

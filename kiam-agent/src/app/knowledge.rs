//! The parts that answer questions about pods, and what feeds them.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    Error,
    build::Common,
    inside::Paths,
    listeners::trusted,
    observe::Sightings,
    upstream::{policy_config, region, source},
    warm_up::complete,
};
use crate::{
    cluster::{self, Cluster, Synced},
    config::{Config, Hosts},
    credentials::{self, CredentialReader, CredentialSource, Inheritance, Prefetcher},
    handover::{self, Trusted},
    identity::NodeAddresses,
    imds,
    lifecycle::{Drain, Latch},
    pods::{self, Pod, PodIndex, PodReader},
    policy::{RolePolicy, publish_wanted},
    role::{Sessions, Source, WantedRoles},
};

/// How often what there is to tell by Events is looked for.
const EVENTS: Duration = Duration::from_secs(3);

/// The parts that answer questions about pods.
#[derive(Clone)]
pub(super) struct Knowledge {
    pub(super) pods: PodReader,
    pub(super) policy: RolePolicy,
    pub(super) credentials: CredentialReader,
    pub(super) sightings: Sightings,
    pub(super) paths: Paths,
}

// === impl Common ===

impl Common {
    /// Pods, policy and credentials, fed from now on.
    pub(super) async fn knowledge(
        &mut self,
        config: &Config,
        upstream: &imds::Upstream,
    ) -> Result<Knowledge, Error> {
        let (index, pods) = PodIndex::with(pods::Config {
            static_pod_namespaces: config.static_pod_namespaces.clone(),
            node: Arc::new(NodeAddresses::default()),
        });
        let cluster = Cluster::new(config.cluster.clone()).await?;
        let synced = Synced {
            pods: self.readiness.latch("pods"),
            namespaces: self.readiness.latch("namespaces"),
            service_accounts: (config.sts.source == Source::WebIdentity)
                .then(|| self.readiness.latch("service accounts")),
        };
        let metrics = cluster::Metrics::register(&mut self.registry);
        let events = cluster.events(&metrics);
        let first = self.readiness.latch("first credentials");
        let region = region(config, upstream).await?;
        let policy = policy_config(config, upstream, &region).await?;
        let policy = RolePolicy::new(policy, pods.clone());
        let tokens = (&cluster, &pods, &metrics);
        let source = source(config, region, self.clock.clone(), tokens).await?;
        let feeds = cluster.run(index, pods.clone(), synced, metrics, self.drain.clone());
        self.tasks.spawn(feeds);
        let (wanted, receiver) = watch::channel(WantedRoles::default());
        let (mut prefetcher, credentials) =
            self.prefetcher(config, source, (&pods, receiver), first);
        let serves = served(config.cluster.node_name.is_some(), config.hosts);
        let told = self.told(config, (&pods, &policy, &credentials));
        let events = events.run(told, self.drain.clone());
        let publish = publish_wanted(policy.clone(), serves, wanted, self.drain.clone());
        // Published only once all kinds are known, so that the first set is the whole one.
        let readiness = self.readiness.clone();
        let mut drain = self.drain.clone();
        let (state_dir, trusted) = (config.state_dir.clone(), trusted(config));
        self.tasks.spawn(async move {
            tokio::select! {
                () = complete(&readiness, &["pods", "namespaces", "service accounts"]) => {}
                () = drain.started() => return,
            }
            // As late as that, so that it is as fresh as can be.
            prefetcher.inherit(inherited(&state_dir, &trusted).await);
            // Polled in this order: the prefetcher's first look must not be at a set that is empty yet.
            tokio::join!(biased; publish, prefetcher.run(drain), events);
        });
        Ok(Knowledge {
            pods,
            policy,
            credentials,
            sightings: Sightings::default(),
            paths: Paths::default(),
        })
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
            self.tasks.spawn(tell_sessions(wanted.clone(), self.drain.clone()));
        }
        let watched = pods.clone();
        let parts = credentials::Parts {
            source,
            render: imds::wire::render,
            clock: self.clock.clone(),
            wanted,
            silence: Box::new(move || watched.silence()),
            metrics: credentials::Metrics::register(&mut self.registry, self.statsd.clone()),
            first_pass,
        };
        let (prefetcher, credentials) = Prefetcher::new(config.credentials, parts);
        self.registry.register_collector(Box::new(credentials::Held::new(credentials.clone())));
        (prefetcher, credentials)
    }

    /// What there is to tell by Events.
    fn told(
        &self,
        config: &Config,
        (pods, policy, credentials): (&PodReader, &RolePolicy, &CredentialReader),
    ) -> cluster::EventParts {
        cluster::EventParts {
            pods: pods.clone(),
            serves: Box::new(served(config.cluster.node_name.is_some(), config.hosts)),
            policy: policy.clone(),
            credentials: credentials.clone(),
            clock: self.clock.clone(),
            period: EVENTS,
            send: !config.observes(),
        }
    }
}

/// What the agent that runs holds. Whatever is odd about it, nothing is lost but calls to STS.
async fn inherited(state_dir: &Path, trusted: &Trusted) -> Inheritance {
    let Some(held) = handover::credentials(state_dir, trusted).await else {
        return Inheritance::default();
    };
    Inheritance::read(&held).unwrap_or_else(|error| {
        warn!(%error, "What the agent that runs holds is of no use; asking STS for all of it");
        Inheritance::default()
    })
}

/// Says what sessions of the pods' own cost, once it is known what is wanted.
async fn tell_sessions(mut wanted: watch::Receiver<WantedRoles>, mut drain: Drain) {
    tokio::select! {
        first = wanted.wait_for(|wanted| !wanted.is_empty()) => if let Ok(first) = first {
            info!(
                "Session names, source identities or tags are the pods' own: {}",
                Sessions::of(&first)
            );
        },
        () = drain.started() => {}
    }
}

/// Which pods' credentials are prefetched: with a node's name all that are watched, else those of this host.
fn served(by_node: bool, hosts: Hosts) -> impl Fn(&Pod) -> bool {
    move |pod| {
        by_node
            || match pod.host_ip {
                Some(IpAddr::V4(address)) => hosts.v4 == Some(address),
                Some(IpAddr::V6(address)) => hosts.v6 == Some(address),
                None => false,
            }
    }
}

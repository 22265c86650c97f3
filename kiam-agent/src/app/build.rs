//! One function a part.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tracing::info;

use super::{
    App, Bound, Error, attach, first_pass,
    keeper::keep_lease,
    listeners::{bind, listen, target},
    operations,
    upstream::{policy_config, region},
};
use crate::{
    admin::{self, Surface},
    clock::Clock,
    cluster::{self, Cluster, Synced},
    config::{Config, Hosts, Identity},
    credentials::{self, CredentialReader, Prefetcher},
    identity::{CgroupPaths, KernelResolver, SourceIpResolver},
    imds, intercept,
    intercept::Interception,
    lifecycle::{Drain, Readiness, drain},
    pods::{ClientResolver, Pod, PodIndex, PodReader},
    policy::{RolePolicy, publish_wanted},
    role::WantedRoles,
    serve::{self, Listener},
    sts,
    telemetry::Statsd,
};

/// What every part may be given.
struct Common {
    registry: Registry,
    statsd: Statsd,
    readiness: Readiness,
    clock: Clock,
    drain: Drain,
    tasks: JoinSet<()>,
}

/// The parts that answer questions about pods.
struct Knowledge {
    pods: PodReader,
    policy: RolePolicy,
    credentials: CredentialReader,
}

pub(super) async fn start(config: Config) -> Result<App, Error> {
    let (signal, drain) = drain();
    let mut common = Common {
        registry: Registry::default(),
        statsd: Statsd::off(),
        readiness: Readiness::default(),
        clock: Clock::system(),
        drain,
        tasks: JoinSet::new(),
    };
    let attached = common.readiness.latch("kernel programs attached");
    let serving = common.readiness.latch("serving pods");
    common.statsd(config.statsd)?;
    let tokens = imds::TokenAuthority::open(&config.state_dir)?;
    let listeners = bind(&config.hosts, config.port).await?;
    let pods: Vec<SocketAddr> = listeners.iter().filter_map(|l| l.local_addr().ok()).collect();
    let interception = match &config.intercept {
        Some(intercept) => Some(Interception::load(intercept, target(&pods))?),
        None => None,
    };
    let upstream = imds::Upstream::new(config.upstream.clone());
    let knowledge = common.knowledge(&config, &upstream).await?;
    first_pass(&common.readiness, &["pods", "namespaces", "first credentials"]).await;
    let parts = match interception {
        Some(interception) => Some(attach(interception).await?),
        None => None,
    };
    let resolver = resolver(config.identity, parts.as_ref(), &knowledge.pods)?;
    let service = imds::Service::new(
        config.imds.clone(),
        imds::Parts {
            pods: knowledge.pods.clone(),
            policy: knowledge.policy.clone(),
            credentials: knowledge.credentials.clone(),
            tokens,
            upstream,
            clock: common.clock.clone(),
            metrics: imds::Metrics::register(&mut common.registry, common.statsd.clone()),
        },
    );
    common.serve(listeners, resolver, service);
    serving.set();
    match parts {
        Some(parts) => {
            info!(cgroup = %parts.cgroup.path().display(), "Kernel programs attached");
            common.registry.register_collector(Box::new(parts.verdicts.clone()));
            common.tasks.spawn(keep_lease(parts, attached, common.drain.clone()));
        }
        None => attached.set(),
    }
    let bound = common.operate(&config, knowledge, pods).await?;
    info!(pods = ?bound.pods, admin = %bound.admin, "Listening");
    Ok(App { bound, readiness: common.readiness, drain: signal, tasks: common.tasks })
}

// === impl Common ===

impl Common {
    fn statsd(&mut self, config: Option<(SocketAddr, Duration)>) -> Result<(), Error> {
        if let Some((server, interval)) = config {
            let (statsd, flush) = Statsd::to(server, interval).map_err(Error::Statsd)?;
            self.statsd = statsd;
            self.tasks.spawn(flush.run(self.drain.clone()));
        }
        Ok(())
    }

    /// Pods, policy and credentials, fed from now on.
    async fn knowledge(
        &mut self,
        config: &Config,
        upstream: &imds::Upstream,
    ) -> Result<Knowledge, Error> {
        let (index, pods) = PodIndex::new();
        let cluster = Cluster::new(config.cluster.clone()).await?;
        let synced = Synced {
            pods: self.readiness.latch("pods"),
            namespaces: self.readiness.latch("namespaces"),
        };
        let metrics = cluster::Metrics::register(&mut self.registry);
        let feeds = cluster.run(index, pods.clone(), synced.clone(), metrics, self.drain.clone());
        let first = self.readiness.latch("first credentials");
        let policy = RolePolicy::new(policy_config(config, upstream).await?, pods.clone());
        let region = region(config, upstream).await?;
        let sts = sts::Config {
            region,
            endpoint: config.sts_endpoint.clone(),
            upstream: config.upstream.to_string(),
        };
        let source = Arc::new(sts::AssumeRole::new(&sts, self.clock.clone()).await?);
        self.tasks.spawn(feeds);
        let (wanted, receiver) = watch::channel(WantedRoles::default());
        let metrics = credentials::Metrics::register(&mut self.registry, self.statsd.clone());
        let (prefetcher, credentials) = Prefetcher::new(
            source,
            imds::wire::render,
            self.clock.clone(),
            receiver,
            (metrics, first),
        );
        let held = credentials::Held::new(credentials.clone());
        self.registry.register_collector(Box::new(held));
        let serves = served(config.cluster.node_name.is_some(), config.hosts);
        let publish = publish_wanted(policy.clone(), serves, wanted, self.drain.clone());
        // Published only once both kinds are known, so that the first set is the whole one.
        let readiness = self.readiness.clone();
        self.tasks.spawn(async move {
            first_pass(&readiness, &["pods", "namespaces"]).await;
            publish.await;
        });
        let drain = self.drain.clone();
        let readiness = self.readiness.clone();
        self.tasks.spawn(async move {
            first_pass(&readiness, &["pods", "namespaces"]).await;
            prefetcher.run(drain).await;
        });
        Ok(Knowledge { pods, policy, credentials })
    }

    fn serve(
        &mut self,
        sockets: Vec<TcpListener>,
        resolver: Arc<dyn ClientResolver>,
        service: imds::Service,
    ) {
        let listeners = sockets
            .into_iter()
            .map(|socket| Listener { socket, resolver: resolver.clone() })
            .collect();
        let metrics = serve::Metrics::register(&mut self.registry);
        let config = serve::Config::default();
        let drain = self.drain.clone();
        self.tasks.spawn(serve::run(listeners, Arc::new(service), config, metrics, drain));
    }

    /// Opens what operators ask.
    async fn operate(
        &mut self,
        config: &Config,
        knowledge: Knowledge,
        pods: Vec<SocketAddr>,
    ) -> Result<Bound, Error> {
        let listener = listen("--admin", config.admin).await?;
        let admin = listener.local_addr().unwrap_or(config.admin);
        let failed = |source| Error::Bind {
            flag: "--state-dir",
            address: config.state_dir.join(admin::SOCKET).display().to_string(),
            source,
        };
        let (socket, _) = admin::bind_unix(&config.state_dir).map_err(failed)?;
        let Knowledge { pods: reader, policy, credentials } = knowledge;
        let registry = std::mem::take(&mut self.registry);
        let readiness = self.readiness.clone();
        let operations =
            Arc::new(operations::operations(readiness, registry, reader, policy, credentials));
        let drain = &self.drain;
        let status = Surface::Status;
        self.tasks.spawn(admin::serve_tcp(listener, status, operations.clone(), drain.clone()));
        self.tasks.spawn(admin::serve_unix(socket, operations.clone(), drain.clone()));
        let mut metrics = None;
        if let Some(address) = config.metrics {
            let listener = listen("--metrics", address).await?;
            metrics = listener.local_addr().ok();
            let serve = admin::serve_tcp(listener, Surface::Metrics, operations, drain.clone());
            self.tasks.spawn(serve);
        }
        Ok(Bound { pods, admin, metrics })
    }
}

fn resolver(
    identity: Identity,
    parts: Option<&intercept::Parts>,
    pods: &PodReader,
) -> Result<Arc<dyn ClientResolver>, Error> {
    match (identity, parts) {
        (Identity::Kernel, Some(parts)) => {
            let cgroups = CgroupPaths::new(parts.cgroup.path()).map_err(Error::Cgroup)?;
            Ok(Arc::new(KernelResolver::new(parts.flows.clone(), cgroups, pods.clone())))
        }
        _ => Ok(Arc::new(SourceIpResolver)),
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

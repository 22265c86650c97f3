//! One function a part.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{Notify, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use super::{
    App, Bound, Error, guard,
    keeper::Keeper,
    listeners::{Listeners, target},
    observe::{self, Observer, Sightings},
    operations, proof,
    running::{Operators, Successor},
    upstream::{policy_config, region},
    warm_up::{complete, warm_up},
};
use crate::{
    admin::{self, Operations, OwnSocket, Surface},
    clock::Clock,
    cluster::{self, Cluster, Synced},
    config::{Config, Hosts, Identity},
    credentials::{self, CredentialReader, Prefetcher},
    identity::{CgroupPaths, KernelResolver, NodeAddresses, SourceIpResolver},
    imds,
    intercept::{self, Interception, Parts, Witness},
    lifecycle::{Drain, Latch, Readiness, drain},
    pods::{self, ClientResolver, Pod, PodIndex, PodReader},
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
#[derive(Clone)]
pub(super) struct Knowledge {
    pub(super) pods: PodReader,
    pub(super) policy: RolePolicy,
    pub(super) credentials: CredentialReader,
    pub(super) sightings: Sightings,
}

/// The programs at work, and the pods' cgroups below them.
type Kernel = (Parts, CgroupPaths);

pub(super) async fn start(config: Config) -> Result<App, Error> {
    let (signal, drain) = drain();
    let mut common = Common::new(drain);
    let attached = common.readiness.latch("kernel programs attached");
    let serving = common.readiness.latch("serving pods");
    common.statsd(config.statsd)?;
    let tokens = imds::TokenAuthority::open(&config.state_dir)?;
    prepare(&config)?;
    let upstream = imds::Upstream::new(config.upstream.clone());
    let knowledge = common.knowledge(&config, &upstream).await?;
    let operations = Arc::new(operations::operations(&common.readiness, &knowledge));
    let failed = Error::state(&config, admin::SOCKET);
    let (socket, own) = admin::bind_unix(&config.state_dir).map_err(failed)?;
    let operators = Operators::answer(socket, operations.clone());
    warm_up(&common.readiness, &knowledge.credentials, &config).await;
    // An agent that runs goes on until this one serves.
    let mut listeners = Listeners::acquire(&config).await?;
    let spare = listeners.duplicates().map_err(Error::Handover)?;
    let unfiltered = listeners.unfiltered(&config).map_err(Error::Handover)?;
    let pods = listeners.pods();
    let mut kernel = attach(&config, &listeners).await?;
    let witness = Witness::default();
    let resolver = resolver(config.identity, kernel.as_ref(), &knowledge.pods, witness.clone());
    let service = common.service(&config, &knowledge, tokens, upstream);
    common.serve(std::mem::take(&mut listeners.pods), resolver, service);
    serving.set();
    common.guard(&config, kernel.as_mut(), witness).await?;
    common.observe(kernel.as_mut(), &knowledge);
    let reassert = Arc::new(Notify::new());
    common.keep(kernel, attached, reassert.clone());
    let successor = Successor::await_next(&config, spare, reassert.clone())?;
    let handover = listeners.handover.take();
    let bound = common.operate(&config, operations, (listeners, pods), &own)?;
    if let Some(handover) = handover
        && !handover.taken().await
    {
        // It may have put its own programs back before it heard.
        reassert.notify_one();
    }
    // Not before: until then that agent might have had to go on.
    for socket in &unfiltered {
        intercept::unfilter(socket.as_fd()).map_err(Error::Handover)?;
    }
    info!(pods = ?bound.pods, admin = %bound.admin, "Listening");
    let detach = config.intercept.filter(|_| config.detach_on_exit).map(|config| config.bpffs);
    let Common { readiness, tasks, .. } = common;
    Ok(App {
        bound,
        readiness,
        drain: signal,
        tasks,
        operators,
        successor,
        relieved: false,
        detach,
    })
}

// === impl Common ===

impl Common {
    fn new(drain: Drain) -> Self {
        Self {
            registry: Registry::default(),
            statsd: Statsd::off(),
            readiness: Readiness::default(),
            clock: Clock::system(),
            drain,
            tasks: JoinSet::new(),
        }
    }

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
        let (index, pods) = PodIndex::with(pods::Config {
            static_pod_namespaces: config.static_pod_namespaces.clone(),
            node: Arc::new(NodeAddresses::default()),
        });
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
        let watched = pods.clone();
        let parts = credentials::Parts {
            source,
            render: imds::wire::render,
            clock: self.clock.clone(),
            wanted: receiver,
            silence: Box::new(move || watched.silence()),
            metrics,
            first_pass: first,
        };
        let (prefetcher, credentials) = Prefetcher::new(config.credentials, parts);
        let held = credentials::Held::new(credentials.clone());
        self.registry.register_collector(Box::new(held));
        let serves = served(config.cluster.node_name.is_some(), config.hosts);
        let publish = publish_wanted(policy.clone(), serves, wanted, self.drain.clone());
        // Published only once both kinds are known, so that the first set is the whole one.
        let readiness = self.readiness.clone();
        let mut drain = self.drain.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = complete(&readiness, &["pods", "namespaces"]) => {}
                () = drain.started() => return,
            }
            // Polled in this order: the prefetcher's first look must not be at a set that is empty yet.
            tokio::join!(biased; publish, prefetcher.run(drain));
        });
        Ok(Knowledge { pods, policy, credentials, sightings: Sightings::default() })
    }

    /// Tells of who asks, where that is all there is to do.
    fn observe(&mut self, kernel: Option<&mut Kernel>, knowledge: &Knowledge) {
        let Some((parts, cgroups)) = kernel else { return };
        let Some(observed) = parts.observed.take() else { return };
        let observer = Observer {
            observed,
            cgroups: cgroups.clone(),
            pods: knowledge.pods.clone(),
            policy: knowledge.policy.clone(),
            sightings: knowledge.sightings.clone(),
            metrics: observe::Metrics::register(&mut self.registry),
        };
        self.tasks.spawn(observer.run(self.drain.clone()));
    }

    /// Guards what slips past the programs, and proves that nothing does.
    async fn guard(
        &mut self,
        config: &Config,
        kernel: Option<&mut Kernel>,
        witness: Witness,
    ) -> Result<(), Error> {
        let (Some(config), Some((parts, _))) = (&config.intercept, kernel) else { return Ok(()) };
        let seen = (&mut self.registry, &self.readiness);
        let started = guard::start(config, parts, seen, self.drain.clone(), &mut self.tasks).await;
        started.map_err(intercept::Error::from)?;
        let seen = (&mut self.registry, &self.readiness);
        proof::start(config, parts, witness, seen, self.drain.clone(), &mut self.tasks);
        Ok(())
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

    /// Looks after the kernel's part from now on, if there is one.
    fn keep(&mut self, kernel: Option<Kernel>, attached: Latch, reassert: Arc<Notify>) {
        let Some((parts, cgroups)) = kernel else { return attached.set() };
        info!(cgroup = %parts.cgroup.path().display(), "Kernel programs attached");
        self.registry.register_collector(Box::new(parts.verdicts.clone()));
        let keeper = Keeper::new(parts, cgroups, attached, &self.readiness, reassert);
        self.tasks.spawn(keeper.run(self.drain.clone()));
    }

    /// What answers pods.
    fn service(
        &mut self,
        config: &Config,
        knowledge: &Knowledge,
        tokens: imds::TokenAuthority,
        upstream: imds::Upstream,
    ) -> imds::Service {
        let parts = imds::Parts {
            pods: knowledge.pods.clone(),
            policy: knowledge.policy.clone(),
            credentials: knowledge.credentials.clone(),
            tokens,
            upstream,
            clock: self.clock.clone(),
            metrics: imds::Metrics::register(&mut self.registry, self.statsd.clone()),
        };
        imds::Service::new(config.imds.clone(), parts)
    }

    /// Answers operators over TCP, which is the serving agent's, and lets `admin.sock` lead to this process.
    fn operate(
        &mut self,
        config: &Config,
        operations: Arc<Operations>,
        (listeners, pods): (Listeners, Vec<SocketAddr>),
        socket: &OwnSocket,
    ) -> Result<Bound, Error> {
        let admin = listeners.admin.local_addr().unwrap_or(config.admin);
        let metrics = listeners.metrics.as_ref().and_then(|socket| socket.local_addr().ok());
        // Set once, here: every part has registered its metrics.
        let _ = operations.registry.set(std::mem::take(&mut self.registry));
        let sockets =
            [(Some(listeners.admin), Surface::Status), (listeners.metrics, Surface::Metrics)];
        for (socket, surface) in sockets {
            if let Some(socket) = socket {
                let drain = self.drain.clone();
                self.tasks.spawn(admin::serve_tcp(socket, surface, operations.clone(), drain));
            }
        }
        socket.link().map_err(Error::state(config, admin::SOCKET))?;
        Ok(Bound { pods, admin, metrics })
    }
}

/// What is done before anything is asked; tells of what an agent with interceptor left to one without.
fn prepare(config: &Config) -> Result<(), Error> {
    match &config.intercept {
        Some(config) => intercept::prepare(config)?,
        None if intercept::is_installed(&config.bpffs) => warn!(
            bpffs = %config.bpffs.display(),
            "An earlier agent's kernel programs are still attached, and refuse pods from ten seconds after its end: take them away with kiam-agent uninstall --force"
        ),
        None => {}
    }
    Ok(())
}

/// Loads and attaches the kernel programs, if there are to be any.
async fn attach(config: &Config, listeners: &Listeners) -> Result<Option<Kernel>, Error> {
    let Some(config) = config.intercept.clone() else { return Ok(None) };
    let sockets = listeners.duplicates_for_pods().map_err(Error::Handover)?;
    let target = target(&listeners.pods());
    // Both block, for as long as the verifier takes.
    let panicked = |_| Error::Panicked;
    let load = move || Interception::load(&config, target);
    let loaded = tokio::task::spawn_blocking(load).await.map_err(panicked)??;
    if listeners.handover.as_ref().is_some_and(|handover| !handover.is_awaited()) {
        warn!("The agent that runs waits no more: it has ended, or finds out that this one serves");
    }
    let attach = move || {
        let sockets: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        loaded.attach(&sockets)
    };
    let parts = tokio::task::spawn_blocking(attach).await.map_err(panicked)??;
    let cgroups = CgroupPaths::new(parts.cgroup.clone());
    Ok(Some((parts, cgroups)))
}

fn resolver(
    identity: Identity,
    kernel: Option<&Kernel>,
    pods: &PodReader,
    witness: Witness,
) -> Arc<dyn ClientResolver> {
    match (identity, kernel) {
        (Identity::Kernel, Some((parts, cgroups))) => {
            let (flows, cgroups) = (parts.flows.clone(), cgroups.clone());
            Arc::new(KernelResolver::new(flows, cgroups, pods.clone(), witness))
        }
        _ => Arc::new(SourceIpResolver { witness }),
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

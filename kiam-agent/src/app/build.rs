//! One function a part.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};
use tracing::info;

use super::{
    App, Bound, Error, guard,
    inside::{Held, Insides, Paths},
    keeper::Keeper,
    kernel::{Kernel, attach, prepare, resolver},
    listeners::Listeners,
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
    config::{Config, Hosts},
    credentials::{self, CredentialReader, Prefetcher},
    identity::NodeAddresses,
    imds,
    intercept::{self, Witness},
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
    pub(super) paths: Paths,
}

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
    let sockets = std::mem::take(&mut listeners.pods);
    let serve = common.serve(sockets, resolver, service).await;
    serving.set();
    let inherited = std::mem::take(&mut listeners.inside);
    let held = common.inside(&config, kernel.as_ref(), &knowledge, (serve, inherited))?;
    common.guard(&config, kernel.as_mut(), witness).await?;
    common.observe(kernel.as_mut(), &knowledge);
    let reassert = Arc::new(Notify::new());
    common.keep(kernel, attached, reassert.clone());
    held.adopted().await;
    let sockets = move || held.beside(&spare);
    let successor = Successor::await_next(&config, sockets, reassert.clone())?;
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
        Ok(Knowledge {
            pods,
            policy,
            credentials,
            sightings: Sightings::default(),
            paths: Paths::default(),
        })
    }

    /// Serves inside pods from now on, beginning with the `inherited` sockets.
    fn inside(
        &mut self,
        config: &Config,
        kernel: Option<&Kernel>,
        knowledge: &Knowledge,
        (serve, inherited): (mpsc::Sender<Listener>, Vec<std::net::TcpListener>),
    ) -> Result<Held, Error> {
        let (Some(config), Some((parts, cgroups))) = (&config.intercept, kernel) else {
            return Ok(Held::default());
        };
        if !config.listens_inside() {
            return Ok(Held::default());
        }
        let held = Held::of(&parts.inside);
        let insides = Insides {
            inside: parts.inside.clone(),
            flows: parts.flows.clone(),
            cgroups: cgroups.clone(),
            serve,
            held: held.clone(),
            otherwise: config.path,
        };
        let seen = (&mut self.registry, knowledge);
        insides.start(parts, seen, inherited, (self.drain.clone(), &mut self.tasks))?;
        Ok(held)
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

    /// Serves pods at `sockets`, and at what is sent from now on.
    async fn serve(
        &mut self,
        sockets: Vec<TcpListener>,
        resolver: Arc<dyn ClientResolver>,
        service: imds::Service,
    ) -> mpsc::Sender<Listener> {
        let (sender, listeners) = mpsc::channel(64);
        let metrics = serve::Metrics::register(&mut self.registry);
        let config = serve::Config::default();
        let drain = self.drain.clone();
        self.tasks.spawn(serve::run(listeners, Arc::new(service), config, metrics, drain));
        for socket in sockets {
            // Refused only when the drain has begun.
            let _ = sender.send(Listener::new(socket, resolver.clone())).await;
        }
        sender
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

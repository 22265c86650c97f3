//! One function a part.

use std::{
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tracing::info;

use super::{
    App, Bound, Error,
    ending::Departure,
    guard,
    kernel::{Kernel, attach, prepare, resolver},
    knowledge::{Knowledge, entitlement, served},
    listeners::Listeners,
    running::{Operators, Successor},
    selftest,
    warm_up::{first_pass, warm_up},
};
use crate::{
    admin::{self, Operations, OwnSocket, PodRefresher, Surface},
    config::Config,
    explain,
    handover::{Gives, Handover},
    imds,
    observe::{self, Observer},
    older_pods,
    pod_listeners::{OpenListeners, PodListeners},
    serve::{self, Listener},
};
use kiam_core::{
    clock::Clock,
    lifecycle::{Drain, Latch, Readiness, drain},
    pods::ClientResolver,
    telemetry::{LogLevel, Statsd},
};
use kiam_kernel::{
    intercept::{self, Parts, Shortage},
    keeper::{Installation, Keeper},
    pins::InUse,
    sandboxes::{self, Sandboxes, Unplaced},
    selftest::Witness,
    sys,
};

/// Pods of a large node; EKS's default is 110, and 250 with prefix delegation.
const PODS: usize = 250;
/// How often all sandboxes are scanned, besides the scans that events cause.
const SWEEP: Duration = Duration::from_secs(30);

/// What every part may be given.
pub(super) struct Common {
    pub(super) registry: Registry,
    pub(super) statsd: Statsd,
    pub(super) readiness: Readiness,
    pub(super) clock: Clock,
    pub(super) drain: Drain,
    pub(super) tasks: JoinSet<()>,
}

pub(super) async fn start(config: Config, log_level: LogLevel) -> Result<App, Error> {
    let (signal, drain) = drain();
    let mut common = Common::new(drain);
    let attached = common.readiness.latch("kernel programs attached");
    let serving = common.readiness.latch("serving pods");
    common.statsd(config.statsd)?;
    let tokens = imds::TokenAuthority::open(&config.state_dir)?;
    let in_use = prepare(&config).await?;
    let upstream = imds::Upstream::new(config.upstream.clone());
    let knowledge = common.knowledge(&config, &upstream).await?;
    let operations = Arc::new(common.operations(&config, &knowledge, log_level));
    let failed = Error::state(&config, admin::SOCKET);
    let (socket, own) = admin::bind_unix(&config.state_dir).map_err(failed)?;
    let operators = Operators::answer(socket, operations.clone());
    // The sockets inside pods come all at once.
    serve::raise_open_files();
    // An agent that runs goes on until this one serves.
    let warm = warm_up(&common.readiness, &knowledge.credentials, &config);
    let mut listeners = Listeners::acquire(&config, warm).await?;
    let spare = listeners.duplicates().map_err(Error::Handover)?;
    let unfiltered = listeners.unfiltered(&config).map_err(Error::Handover)?;
    let pods = listeners.pods();
    let mut kernel = attach(&config, &listeners).await?;
    let witness = Witness::default();
    let resolver = resolver(config.identity, kernel.as_ref(), &knowledge, witness.clone());
    let service = common.service(&config, &knowledge, tokens, upstream);
    let serve = common.serve(service, serving_config(&config));
    let inherited = std::mem::take(&mut listeners.inside);
    let superseded = Arc::new(Notify::new());
    let serves = (serve.clone(), inherited, superseded.clone());
    let held = common.inside(&config, kernel.as_ref(), &knowledge, serves)?;
    common.first_pass(listeners.cold, &held).await;
    serve_at(std::mem::take(&mut listeners.pods), resolver, serve).await;
    serving.set();
    common.guard(&config, kernel.as_mut(), witness).await?;
    common.observe(kernel.as_mut(), &knowledge);
    let reassert = Arc::new(Notify::new());
    common.keep(kernel, in_use, (attached, reassert.clone()))?;
    let departure = Departure::new(config.grace_period);
    let gives = gives(&knowledge, held, spare, departure.clone());
    let successor = Successor::await_next(&config, gives, reassert.clone())?;
    let (handover, turn) = (listeners.handover.take(), listeners.turn.take());
    let bound = common.operate(&config, operations, (listeners, pods), &own)?;
    supersede(handover, &reassert, &superseded).await;
    // From now on the next one finds this one.
    drop(turn);
    // Not before: until then that agent might have had to go on.
    unfilter(&unfiltered)?;
    info!(pods = ?bound.pods, admin = %bound.admin, "Listening");
    let detach = config.intercept.filter(|_| config.detach_on_exit).map(|config| config.bpffs);
    Ok(App {
        bound,
        readiness: common.readiness,
        drain: signal,
        tasks: common.tasks,
        operators,
        successor,
        relieved: false,
        detach,
        departure,
    })
}

/// Tells the agent that gave its sockets that this one serves.
async fn supersede(handover: Option<Handover>, reassert: &Notify, superseded: &Notify) {
    let Some(handover) = handover else { return };
    if !handover.taken().await {
        // It may have put its own programs back before it heard.
        reassert.notify_one();
    }
    superseded.notify_one();
}

/// Takes the filter of SYNs off these sockets.
fn unfilter(sockets: &[OwnedFd]) -> Result<(), Error> {
    let mut sockets = sockets.iter();
    sockets.try_for_each(|socket| sys::unfilter(socket.as_fd())).map_err(Error::Handover)
}

/// Serves pods at `sockets` too.
async fn serve_at(
    sockets: Vec<TcpListener>,
    resolver: Arc<dyn ClientResolver>,
    serve: mpsc::Sender<Listener>,
) {
    for socket in sockets {
        // Refused only when the drain has begun.
        let _ = serve.send(Listener::new(socket, resolver.clone())).await;
    }
}

/// What the agent after this one is given.
fn gives(
    knowledge: &Knowledge,
    open: OpenListeners,
    spare: Vec<OwnedFd>,
    departure: Departure,
) -> Gives {
    let credentials = knowledge.credentials.clone();
    Gives {
        sockets: Box::new(move || open.copies_with(&spare)),
        credentials: Box::new(move || credentials.bequeath()),
        stays: Box::new(move || !departure.is_near()),
    }
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

    /// What operators see and change.
    fn operations(
        &self,
        config: &Config,
        knowledge: &Knowledge,
        log_level: LogLevel,
    ) -> Operations {
        let Knowledge { pods, policy, credentials, refresher, .. } = knowledge.clone();
        let settings = explain::Settings {
            node: config.cluster.node_name.clone(),
            imdsv2: config.imds.imdsv2,
            entitlement: entitlement(config),
            observes: config.observes(),
        };
        let sources = explain::Sources {
            pods: pods.clone(),
            policy: policy.clone(),
            credentials: credentials.clone(),
            paths: knowledge.paths.clone(),
            exposure: knowledge.exposure.clone(),
            journal: knowledge.journal.clone(),
            sightings: knowledge.sightings.clone(),
        };
        let explainer = explain::Explainer::new(settings, sources, self.clock.clone());
        let refresher = PodRefresher { pods, policy, credentials, refresher };
        Operations::new(self.readiness.clone(), explainer, refresher, log_level)
    }

    /// Waits for what has to be there before the node's listener is served.
    async fn first_pass(&self, cold: bool, open: &OpenListeners) {
        if cold {
            // It came while the programs were loaded. Since they are attached pods are denied.
            first_pass(&self.readiness).await;
        }
        // At the node's listener pods are known by their network namespaces.
        open.adopted().await;
    }

    /// Serves inside pods from now on, beginning with the `inherited` sockets, and searches for pods that are older than the
    /// programs.
    fn inside(
        &mut self,
        config: &Config,
        kernel: Option<&Kernel>,
        knowledge: &Knowledge,
        (serve, inherited, superseded): (
            mpsc::Sender<Listener>,
            Vec<std::net::TcpListener>,
            Arc<Notify>,
        ),
    ) -> Result<OpenListeners, Error> {
        self.older(config, kernel, knowledge);
        let serves = served(config.cluster.node_name.is_some(), config.hosts);
        let (Some(config), Some((parts, cgroups))) = (&config.intercept, kernel) else {
            return Ok(OpenListeners::default());
        };
        if !config.follows_sandboxes() {
            return Ok(OpenListeners::default());
        }
        let followed = sandboxes::Config {
            cgroup: parts.cgroup.clone(),
            sweep: SWEEP,
            listens: config.listens_inside(),
            watched: self.readiness.latch("watches of pods' cgroups (fs.inotify limits)"),
        };
        let metrics = sandboxes::Metrics::register(&mut self.registry);
        let (pods, states) = (knowledge.pods.clone(), knowledge.paths.sandboxes.clone());
        let sandboxes = Sandboxes::new(followed, pods, inherited, metrics, states);
        let sandboxes = sandboxes.map_err(Error::Sandboxes)?;
        let only_known = config.has_filter() && parts.host_netns.is_some();
        knowledge.paths.set(config.path, only_known);
        let open = OpenListeners::awaiting(&parts.sandboxes);
        let listeners = PodListeners {
            table: parts.sandboxes.clone(),
            flows: parts.flows.clone(),
            cgroups: cgroups.clone(),
            serve,
            open: open.clone(),
            superseded,
        };
        let followed = listeners.start(sandboxes, self.drain.clone());
        self.tasks.spawn(followed.map_err(Error::Sandboxes)?);
        let (pods, states) = (knowledge.pods.clone(), knowledge.paths.sandboxes.clone());
        let unplaced = Unplaced::new(pods, states, serves, &mut self.registry, &self.readiness);
        self.tasks.spawn(unplaced.run(self.drain.clone()));
        Ok(open)
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

    /// Searches for pods that ran before they were intercepted.
    fn older(&mut self, config: &Config, kernel: Option<&Kernel>, knowledge: &Knowledge) {
        let (Some(intercept), Some((parts, _))) = (&config.intercept, kernel) else { return };
        let search = older_pods::Search {
            pods: knowledge.pods.clone(),
            exposure: knowledge.exposure.clone(),
            serves: served(config.cluster.node_name.is_some(), config.hosts),
            entitlement: entitlement(config),
            clock: self.clock.clone(),
            config: intercept.clone(),
            attached: parts.attached.clone(),
            gauge: older_pods::gauge(&mut self.registry),
        };
        self.tasks.spawn(search.run(self.drain.clone()));
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
        selftest::start(config, parts, witness, seen, self.drain.clone(), &mut self.tasks);
        Ok(())
    }

    /// Serves pods at what is sent from now on.
    fn serve(&mut self, service: imds::Service, config: serve::Config) -> mpsc::Sender<Listener> {
        let (sender, listeners) = mpsc::channel(64);
        let metrics = serve::Metrics::register(&mut self.registry);
        let drain = self.drain.clone();
        self.tasks.spawn(serve::run(listeners, Arc::new(service), config, metrics, drain));
        sender
    }

    /// Looks after the kernel's part from now on, if there is one.
    fn keep(
        &mut self,
        kernel: Option<Kernel>,
        in_use: Option<InUse>,
        (attached, reassert): (Latch, Arc<Notify>),
    ) -> Result<(), Error> {
        let (Some((parts, cgroups)), Some(in_use)) = (kernel, in_use) else {
            attached.set();
            return Ok(());
        };
        let Parts { lease, flows, log, programs, cgroup, verdicts, .. } = parts;
        info!(cgroup = %cgroup.path().display(), "Kernel programs attached");
        let drain = self.drain.clone();
        let renewed = intercept::keep_renewed(lease, attached, &mut self.registry, drain);
        self.tasks.spawn(renewed.map_err(Error::Thread)?);
        let shortage = Shortage::new(verdicts.clone(), &self.readiness);
        self.tasks.spawn(shortage.run(self.drain.clone()));
        self.registry.register_collector(Box::new(verdicts));
        let installation = Installation { programs, flows, log, cgroups, in_use };
        let keeper = Keeper::new(installation, reassert, &mut self.registry, &self.readiness);
        self.tasks.spawn(keeper.run(self.drain.clone()));
        Ok(())
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
            journal: knowledge.journal.clone(),
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

/// Limits that leave open files to listeners inside as many pods as a node runs.
fn serving_config(config: &Config) -> serve::Config {
    let rate = config.pod_rate;
    let mut serving =
        serve::Config { requests: rate, new_connections: rate, ..serve::Config::default() };
    if config.intercept.as_ref().is_some_and(intercept::Config::follows_sandboxes) {
        serving.other_files += sandboxes::descriptors(PODS);
    }
    serving
}

//! The first step of the start: everything that leaves pods, sockets and kernel programs as they are.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use tracing::warn;

use super::{error::Error, knowledge::Knowledge, process::Process};
use crate::{
    admin::{self, Operations, Operators, OwnSocket, PodRefresher, StatusSources},
    config::{Config, Identity},
    explain,
    handover::{Addresses, FirstPass, Peers},
};
use kiam_core::telemetry::LogLevel;
use kiam_kernel::{intercept, pins::AgentLock};
use kiam_requests::{
    audit::{self, Audit},
    imds, serve,
};

/// An agent that knows pods and credentials, or soon will, and has changed nothing yet.
pub(super) struct Prepared {
    pub(super) core: Core,
    pub(super) addresses: Addresses,
    pub(super) interceptor: Option<Interceptor>,
    pub(super) service: Service,
}

/// What every later step has.
pub(super) struct Core {
    pub(super) process: Process,
    pub(super) knowledge: Knowledge,
    pub(super) first_pass: FirstPass,
    /// `--state-dir`.
    pub(super) state_dir: PathBuf,
    pub(super) peers: Peers,
    pub(super) operations: Arc<Operations>,
    pub(super) operators: Operators,
    /// This agent's own admin socket.
    pub(super) socket: OwnSocket,
    pub(super) end: End,
}

/// The kernel's part, which is not attached yet.
pub(super) struct Interceptor {
    pub(super) config: intercept::Config,
    pub(super) agent_lock: AgentLock,
}

/// What answers pods.
pub(super) struct Service {
    pub(super) imds: imds::Service,
    pub(super) identity: Identity,
    pub(super) config: serve::Config,
}

/// How the agent is to end.
pub(super) struct End {
    pub(super) grace_period: Duration,
    pub(super) detach_on_exit: bool,
}

// === impl Prepared ===

impl Prepared {
    /// Prepares what `config` asks for, and answers operators from now on.
    pub(super) async fn new(config: Config, log_level: LogLevel) -> Result<Self, Error> {
        let mut process = Process::new(config.statsd)?;
        let tokens = imds::TokenAuthority::open(&config.state_dir)?;
        let interceptor = interceptor(config.intercept.clone(), &config.bpffs).await?;
        let peers = Peers::new(config.state_dir.clone(), config.intercept.as_ref());
        let upstream = imds::Upstream::new(config.upstream.clone());
        let (knowledge, first_pass) =
            Knowledge::start(&mut process, &config, &upstream, &peers).await?;
        let audit = audit(&mut process, config.audit.clone(), &knowledge)?;
        let operations = Arc::new(operations(&config, &process, &knowledge, log_level));
        let failed = Error::state(&config.state_dir, admin::SOCKET);
        let (listener, socket) = admin::bind_unix(&config.state_dir).map_err(failed)?;
        let operators = Operators::answer(listener, operations.clone());
        // The pod listeners come all at once.
        serve::raise_open_files();
        let serve = config.serve();
        let Config { hosts, port, admin, metrics, identity, state_dir, .. } = config;
        let service = Service {
            imds: service(&mut process, config.imds, &knowledge, tokens, upstream, audit),
            identity,
            config: serve,
        };
        let end = End { grace_period: config.grace_period, detach_on_exit: config.detach_on_exit };
        let core = Core {
            process,
            knowledge,
            first_pass,
            state_dir,
            peers,
            operations,
            operators,
            socket,
            end,
        };
        let pods = hosts.addresses().map(|host| SocketAddr::new(host, port)).collect();
        let addresses = Addresses { pods, admin, metrics };
        Ok(Self { core, addresses, interceptor, service })
    }
}

/// Checks the kernel and takes a share of the pins; warns of what an agent with interceptor left to one without.
async fn interceptor(
    config: Option<intercept::Config>,
    bpffs: &Path,
) -> Result<Option<Interceptor>, Error> {
    let Some(config) = config else {
        if intercept::is_installed(bpffs) {
            warn!(
                bpffs = %bpffs.display(),
                "An earlier agent's kernel programs are still attached, and deny pods 10 s after its end: detach them with kiam-agent uninstall"
            );
        }
        return Ok(None);
    };
    let agent_lock = intercept::prepare_once_possible(&config).await?;
    Ok(Some(Interceptor { config, agent_lock }))
}

/// What operators see and change.
fn operations(
    config: &Config,
    process: &Process,
    knowledge: &Knowledge,
    log_level: LogLevel,
) -> Operations {
    let Knowledge { pods, policy, credentials, refresher, .. } = knowledge.clone();
    let settings = explain::Settings {
        node: config.cluster.node_name.clone(),
        imdsv2: config.imds.imdsv2,
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
    let status = StatusSources {
        readiness: process.readiness.clone(),
        explainer: explain::Explainer::new(settings, sources, process.clock.clone()),
        credentials: credentials.clone(),
        pods: pods.clone(),
        warnings: log_level.warnings(),
        clock: process.clock.clone(),
        started: Instant::now(),
        settings: config.status(),
    };
    let refresher = PodRefresher { pods, policy, credentials, refresher };
    Operations::new(process.readiness.clone(), status, refresher, log_level)
}

/// What records hand-outs of credentials, until the drain begins.
fn audit(
    process: &mut Process,
    config: audit::Config,
    knowledge: &Knowledge,
) -> Result<Audit, Error> {
    let metrics = audit::Metrics::register(&mut process.registry);
    let audit = Audit::start(config, knowledge.pods.clone(), process.clock.clone(), metrics);
    let audit = audit.map_err(Error::Audit)?;
    process.spawn(audit.clone().run(process.drain.clone()));
    Ok(audit)
}

/// What answers requests.
fn service(
    process: &mut Process,
    config: imds::Config,
    knowledge: &Knowledge,
    tokens: imds::TokenAuthority,
    upstream: imds::Upstream,
    audit: Audit,
) -> imds::Service {
    let parts = imds::ServiceParts {
        pods: knowledge.pods.clone(),
        policy: knowledge.policy.clone(),
        credentials: knowledge.credentials.clone(),
        tokens,
        upstream,
        clock: process.clock.clone(),
        metrics: imds::Metrics::register(&mut process.registry, process.statsd.clone()),
        journal: knowledge.journal.clone(),
        audit,
    };
    imds::Service::new(config, parts)
}

//! The fourth step: pods are served, inside their network namespaces and at the node's address.

use std::{
    net::{SocketAddr, TcpListener as Socket},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{Notify, mpsc};

use super::{
    attached::{Attached, Kernel},
    error::Error,
    knowledge::Knowledge,
    prepared::Core,
    process::Process,
};
use crate::{
    config::Identity,
    handover::{OperatorSockets, Takeover},
    older_pods,
    pod_listeners::{OpenListeners, PodListeners},
};
use kiam_core::pods::ClientResolver;
use kiam_kernel::{
    identity::{KernelResolver, Namespaces, SourceIpResolver},
    sandboxes::{self, Sandboxes, Unplaced},
    selftest::Witness,
};
use kiam_requests::{
    imds,
    serve::{self, Listener},
};

/// How often all sandboxes are scanned, besides the scans that events cause.
const SWEEP: Duration = Duration::from_secs(30);

/// An agent that serves pods, and that no agent after it can find yet.
pub(super) struct Serving {
    pub(super) core: Core,
    pub(super) kernel: Option<Kernel>,
    pub(super) operator_sockets: OperatorSockets,
    /// Where pods are served on the node.
    pub(super) pods: Vec<SocketAddr>,
    /// The pod listeners.
    pub(super) open: OpenListeners,
    pub(super) takeover: Takeover,
    pub(super) witness: Witness,
    /// Notified once another agent is superseded or has ended that may have published pod listeners.
    pub(super) republish: Arc<Notify>,
}

// === impl Attached ===

impl Attached {
    /// Serves the pod listeners, then, once pods are known, the node listeners.
    pub(super) async fn serve(self) -> Result<Serving, Error> {
        let Self { mut core, kernel, service, listeners: sockets, takeover } = self;
        let witness = Witness::default();
        let resolver = resolver(service.identity, kernel.as_ref(), &core.knowledge, &witness);
        let serve = answer(&mut core.process, service.imds, service.config);
        if let Some(kernel) = &kernel {
            search_older_pods(&mut core.process, kernel, &core.knowledge);
        }
        let (republish, pods) = (Arc::new(Notify::new()), sockets.pod_addresses());
        let open = match &kernel {
            Some(kernel) if kernel.config.follows_sandboxes() => {
                let open = OpenListeners::published_in(kernel.parts.sandboxes.clone());
                let listeners = PodListeners {
                    table: kernel.parts.sandboxes.clone(),
                    flows: kernel.parts.flows.clone(),
                    cgroups: kernel.cgroups.clone(),
                    serve: serve.clone(),
                    open: open.clone(),
                    republish: republish.clone(),
                };
                follow_sandboxes(&mut core, kernel, listeners, sockets.inherited)?;
                open
            }
            _ => OpenListeners::default(),
        };
        if takeover.cold {
            // It came while the programs were loaded. Since they are attached pods are denied.
            core.first_pass.finish().await;
        }
        // At the node listener pods are known by their network namespaces.
        open.cover_table().await;
        for socket in sockets.pods {
            // Fails only when the drain has begun.
            let _ = serve.send(Listener::new(socket, resolver.clone())).await;
        }
        core.process.serving.set();
        let operator_sockets = sockets.operators;
        Ok(Serving { core, kernel, operator_sockets, pods, open, takeover, witness, republish })
    }
}

/// What says whose a connection is that comes to the node listener.
fn resolver(
    identity: Identity,
    kernel: Option<&Kernel>,
    knowledge: &Knowledge,
    witness: &Witness,
) -> Arc<dyn ClientResolver> {
    let witness = witness.clone();
    match (identity, kernel) {
        (Identity::Kernel, Some(Kernel { parts, cgroups, .. })) => {
            let (flows, cgroups) = (parts.flows.clone(), cgroups.clone());
            let namespaces = parts.host_netns.map(|host| Namespaces {
                host,
                node: knowledge.node.clone(),
                pods: knowledge.pods.clone(),
                sandboxes: Arc::new(knowledge.paths.sandboxes.clone()),
            });
            Arc::new(KernelResolver::new(flows, cgroups, witness, namespaces))
        }
        _ => Arc::new(SourceIpResolver { witness }),
    }
}

/// Answers at the listeners that are sent from now on.
fn answer(
    process: &mut Process,
    service: imds::Service,
    config: serve::Config,
) -> mpsc::Sender<Listener> {
    let (sender, listeners) = mpsc::channel(64);
    let metrics = serve::Metrics::register(&mut process.registry);
    let drain = process.drain.clone();
    process.spawn(kiam_requests::answer(listeners, service, config, metrics, drain));
    sender
}

/// Searches for pods that are older than the programs from now on.
fn search_older_pods(process: &mut Process, kernel: &Kernel, knowledge: &Knowledge) {
    let search = older_pods::Search {
        pods: knowledge.pods.clone(),
        exposure: knowledge.exposure.clone(),
        serves: knowledge.node_pods.filter(),
        clock: process.clock.clone(),
        config: kernel.config.clone(),
        intercepted: kernel.parts.intercepted.clone(),
        gauges: older_pods::Gauges::register(&mut process.registry),
    };
    process.spawn(search.run(process.drain.clone()));
}

/// Follows the pods' sandboxes from now on, beginning with the `inherited` pod listeners, and reports pods without one.
fn follow_sandboxes(
    core: &mut Core,
    kernel: &Kernel,
    listeners: PodListeners,
    inherited: Vec<Socket>,
) -> Result<(), Error> {
    let Core { process, knowledge, .. } = core;
    let (config, parts) = (&kernel.config, &kernel.parts);
    let followed = sandboxes::Config {
        cgroup: parts.cgroup.clone(),
        sweep: SWEEP,
        listens: config.has_pod_listeners(),
        watched: process.readiness.latch("watches of pods' cgroups (fs.inotify limits)"),
    };
    let (pods, states) = (knowledge.pods.clone(), knowledge.paths.sandboxes.clone());
    let metrics = sandboxes::Metrics::register(&mut process.registry, states.clone());
    let sandboxes = Sandboxes::new(followed, pods, inherited, metrics, states);
    let sandboxes = sandboxes.map_err(Error::Sandboxes)?;
    let only_known = config.has_filter() && parts.host_netns.is_some();
    knowledge.paths.set(config.path, only_known);
    let followed = listeners.start(sandboxes, process.drain.clone());
    process.spawn(followed.map_err(Error::Sandboxes)?);
    let (pods, states) = (knowledge.pods.clone(), knowledge.paths.sandboxes.clone());
    let serves = knowledge.node_pods.filter();
    let (registry, readiness) = (&mut process.registry, &process.readiness);
    let unplaced = Unplaced::new(pods, states, serves, registry, readiness);
    process.spawn(unplaced.run(process.drain.clone()));
    Ok(())
}

//! Pods' network namespaces and the listeners inside them: told to the kernel, served, and taken back when their pods go.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    pin::pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use dashmap::DashMap;
use kiam_common::client::Sandbox;
use prometheus_client::registry::Registry;
use tokio::{
    join,
    net::TcpListener,
    runtime::Handle,
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Interval, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::{Error, knowledge::Knowledge};
use crate::serve;
use kiam_core::{
    lifecycle::{Drain, Latch},
    pods::Pod,
};
use kiam_kernel::{
    identity::{CgroupPaths, PodListenerResolver},
    intercept::{self, Flows, InterceptionParts, SandboxTable},
    sandboxes::{self, Event, OpenSandbox, SandboxReader, Sandboxes, State},
};

/// How often all sandboxes are looked at, beside what is noticed at once.
const SWEEP: Duration = Duration::from_secs(30);
/// How long after the start it is certain which pods there are listeners in.
const SETTLED: Duration = Duration::from_secs(30);
/// How often the kernel's list is compared with what is held at first: at a takeover two agents write it, and the last
/// to write need not be the one that stays.
const COMPARE: Duration = Duration::from_millis(100);
/// How often later, when nobody else has a reason to write it: an entry a lookup, on a thread that goes before others.
const RECHECK: Duration = Duration::from_millis(500);
/// How long an agent that takes over may take to serve the sockets that it was given.
const ADOPTION: Duration = Duration::from_secs(1);

/// What is needed to serve inside pods.
pub(super) struct Insides {
    pub(super) table: SandboxTable,
    pub(super) flows: Flows,
    pub(super) cgroups: CgroupPaths,
    /// Where listeners are served.
    pub(super) serve: mpsc::Sender<serve::Listener>,
    pub(super) held: Held,
    /// Set while pods' sandboxes are followed by events.
    pub(super) watched: Latch,
    /// Told when the agent before this one was superseded: it closes the listeners that it opened in pods meanwhile.
    pub(super) superseded: Arc<Notify>,
}

/// The network namespaces that are known to be pods', by cookie, with the sockets that listen inside. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    sockets: Arc<DashMap<u64, Sockets>>,
    /// Where the agent before this one listened, whether it handed its sockets over, crashed or hangs.
    expected: Vec<u64>,
}

/// Which way pods' connections go, once that is known. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Paths {
    asked: Arc<OnceLock<Asked>>,
    pub(super) sandboxes: SandboxReader,
}

/// What decides about the ways.
#[derive(Clone, Copy, Debug)]
struct Asked {
    path: intercept::ListenerPath,
    /// Pods connect only from network namespaces that are known to be theirs.
    only_known: bool,
}

#[derive(Debug)]
struct Sockets {
    sockets: Vec<Arc<TcpListener>>,
    sandbox: Sandbox,
    closed: CancellationToken,
}

// === impl Held ===

impl Held {
    /// None yet; those where pods' connects are sent already are to come.
    pub(super) fn of(table: &SandboxTable) -> Self {
        Self { expected: table.namespaces(), ..Self::default() }
    }

    /// Copies of the sockets in `others`, and of all that listen inside pods: what the agent after this one gets.
    pub(super) fn beside(&self, others: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
        let mut all: Vec<_> = others.iter().map(OwnedFd::try_clone).collect();
        for of_pod in self.sockets.iter() {
            all.extend(of_pod.sockets.iter().map(|socket| socket.as_fd().try_clone_to_owned()));
        }
        all.into_iter().collect()
    }

    /// Waits until it is served again where the agent before this one listened, and for a while at most: a pod may
    /// have gone.
    pub(super) async fn adopted(&self) {
        let all = async {
            while !self.expected.iter().all(|netns| self.has(*netns)) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(ADOPTION, all).await.is_err() {
            debug!("Some of the pods that an earlier agent listened inside of are gone");
        }
    }

    fn insert(&self, netns: u64, sockets: Sockets) {
        if let Some(before) = self.sockets.insert(netns, sockets) {
            before.closed.cancel();
        }
    }

    fn remove(&self, netns: u64) {
        if let Some((_, of_pod)) = self.sockets.remove(&netns) {
            of_pod.closed.cancel();
        }
    }

    fn has(&self, netns: u64) -> bool {
        self.sockets.contains_key(&netns)
    }
}

// === impl Paths ===

impl Paths {
    /// How `pod`'s connections reach the agent, and why; `Err` if they don't.
    pub(super) fn of(&self, pod: &Pod) -> Result<String, String> {
        let Some(asked) = self.asked.get() else { return Ok("node".to_owned()) };
        let node_or = |why: &str, denied| match denied && !pod.host_network {
            true => Err(format!("denied: {why}")),
            false => Ok(format!("node: {why}")),
        };
        let pod_local = asked.path == intercept::ListenerPath::PodLocal;
        let otherwise = |why: &str| node_or(why, pod_local || asked.only_known);
        match self.sandboxes.of(pod) {
            None => otherwise("no cgroup of the pod was seen"),
            Some(State::Known { reason: sandboxes::NoListenerReason::NodePath, .. }) => {
                Ok("node".to_owned())
            }
            Some(State::Known { reason, .. }) => node_or(&reason.to_string(), pod_local),
            Some(state @ State::Ready { .. }) => Ok(format!("pod-local: {state}")),
            // The kernel knows the namespace alone: their connects go to that pod's listener.
            Some(state @ State::Without(sandboxes::NoListenerReason::AnotherPods(_))) => {
                Err(format!("refused: {state}"))
            }
            Some(state) => otherwise(&state.to_string()),
        }
    }
}

// === impl Insides ===

impl Insides {
    /// Follows the pods' sandboxes until the drain begins.
    pub(super) fn start(
        self,
        config: &intercept::Config,
        parts: &InterceptionParts,
        (registry, knowledge): (&mut Registry, &Knowledge),
        inherited: Vec<std::net::TcpListener>,
        (drain, tasks): (Drain, &mut JoinSet<()>),
    ) -> Result<(), Error> {
        let listens = config.has_pod_listeners();
        let (cgroup, watched) = (parts.cgroup.clone(), self.watched.clone());
        let asked = sandboxes::Config { cgroup, sweep: SWEEP, listens, watched };
        let metrics = sandboxes::Metrics::register(registry);
        let (pods, states) = (knowledge.pods.clone(), knowledge.paths.sandboxes.clone());
        let sandboxes = Sandboxes::new(asked, pods, inherited, metrics, states);
        let sandboxes = sandboxes.map_err(Error::Sandboxes)?;
        let only_known = config.has_filter() && parts.host_netns.is_some();
        // Set once, here.
        let _ = knowledge.paths.asked.set(Asked { path: config.path, only_known });
        let (sender, events) = mpsc::channel(64);
        let follow = self.follow(events, Handle::current(), drain.clone());
        // A pod's first connect may be on its way.
        let both = async {
            join!(follow, sandboxes.run(sender, drain));
        };
        tasks.spawn(sandboxes::on_realtime_thread(both).map_err(Error::Sandboxes)?);
        Ok(())
    }

    /// Does what `events` say until the drain begins. What this agent listens on then stays open as long as it
    /// drains; the kernel's list stays for the next one. The runtime that serves is `serving`.
    async fn follow(self, mut events: mpsc::Receiver<Event>, serving: Handle, mut drain: Drain) {
        let mut settled = pin!(sleep(SETTLED));
        let mut tidied = false;
        let mut compare = ticks(COMPARE);
        loop {
            tokio::select! {
                biased;
                () = drain.started() => return,
                _ = compare.tick() => self.compare(),
                () = self.superseded.notified() => self.compare(),
                () = settled.as_mut(), if !tidied => {
                    self.tidy();
                    tidied = true;
                    compare = ticks(RECHECK);
                }
                event = events.recv() => match event {
                    Some(Event::Opened(opened)) => self.open(opened, &serving).await,
                    Some(Event::Closed { netns, .. }) => self.close(netns),
                    None => return,
                },
            }
        }
    }

    async fn open(&self, opened: OpenSandbox, serving: &Handle) {
        let OpenSandbox { pod, cgroup, netns, sockets, .. } = opened;
        let mut sandbox = Sandbox { pod: cgroup, ..Sandbox::default() };
        let mut listening = Vec::new();
        for socket in sockets {
            let address = socket.local_addr();
            let _serves = serving.enter();
            match TcpListener::from_std(socket).and_then(|socket| Ok((socket, address?))) {
                Ok((socket, address)) => {
                    let port = if address.is_ipv4() { &mut sandbox.v4 } else { &mut sandbox.v6 };
                    *port = address.port();
                    listening.push(Arc::new(socket));
                }
                Err(failure) => {
                    error!(error = %failure, pod.uid = %pod, "Socket inside a pod is of no use")
                }
            }
        }
        let sockets = Sockets { sockets: listening, sandbox, closed: CancellationToken::new() };
        // They listen already: who connects now is served in a moment.
        if self.publish(netns, &sockets) {
            match sandbox.v4 {
                0 => debug!(pod.uid = %pod, netns, "Network namespace of a pod known"),
                port => debug!(pod.uid = %pod, netns, port, "Listening inside a pod"),
            }
        }
        for socket in &sockets.sockets {
            let resolver = PodListenerResolver::new(
                self.flows.clone(),
                self.cgroups.clone(),
                pod.clone(),
                netns,
            );
            let listener = serve::Listener {
                socket: socket.clone(),
                resolver: Arc::new(resolver),
                pod: Some(pod.clone()),
                closed: sockets.closed.clone(),
            };
            // Refused only when the drain has begun.
            let _ = self.serve.send(listener).await;
        }
        self.held.insert(netns, sockets);
    }

    fn publish(&self, netns: u64, held: &Sockets) -> bool {
        let published = self.table.publish(netns, held.sandbox, &held.sockets);
        if let Err(failure) = &published {
            error!(error = %failure, netns, "Connects from a pod's network namespace don't come to the agent");
        }
        published.is_ok()
    }

    /// Puts into the kernel's list what another agent has put there otherwise, or taken away.
    fn compare(&self) {
        for held in self.held.sockets.iter() {
            let netns = *held.key();
            if self.table.get(netns) != Some(held.sandbox) && self.publish(netns, &held) {
                debug!(netns, "A pod's network namespace is in the kernel's table again");
            }
        }
    }

    /// Takes out of the kernel's list what an agent that crashed left there and this one does not listen in: until
    /// now it was denied.
    fn tidy(&self) {
        for netns in self.table.namespaces() {
            if !self.held.has(netns) {
                self.close(netns);
            }
        }
    }

    fn close(&self, netns: u64) {
        if let Err(failure) = self.table.withdraw(netns) {
            error!(error = %failure, "A network namespace that is no pod's any more is still in the kernel's table");
        }
        self.held.remove(netns);
    }
}

fn ticks(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

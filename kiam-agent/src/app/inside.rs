//! Listeners inside pods' network namespaces: served, told to the kernel, and taken back when their pods go.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use kiam_common::client::InsidePorts;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

use super::{Error, build::Knowledge};
use crate::{
    identity::{CgroupPaths, InsideResolver},
    intercept::{Flows, Inside, Parts, Path},
    lifecycle::Drain,
    pods::Pod,
    sandboxes::{self, Event, Listener, Reason, SandboxReader, Sandboxes, State},
    serve,
};

/// How often all sandboxes are looked at, beside what is noticed at once.
const SWEEP: Duration = Duration::from_secs(30);
/// How long after the start it is certain which pods there are listeners in.
const SETTLED: Duration = Duration::from_secs(30);
/// How long an agent that takes over may take to serve the sockets that it was given.
const ADOPTION: Duration = Duration::from_secs(1);

/// What is needed to serve inside pods.
pub(super) struct Insides {
    pub(super) inside: Inside,
    pub(super) flows: Flows,
    pub(super) cgroups: CgroupPaths,
    /// Where listeners are served.
    pub(super) serve: mpsc::Sender<serve::Listener>,
    pub(super) held: Held,
    /// How connections go where there is no listener inside.
    pub(super) otherwise: Path,
}

/// The sockets that listen inside pods, by network namespace cookie. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    sockets: Arc<Mutex<HashMap<u64, Sockets>>>,
    /// Where the agent before this one listened, whether it handed its sockets over, crashed or hangs.
    expected: Vec<u64>,
}

/// Which way pods' connections go, once that is known. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Paths(Arc<OnceLock<(SandboxReader, Path)>>);

#[derive(Debug)]
struct Sockets {
    sockets: Vec<Arc<TcpListener>>,
    closed: CancellationToken,
}

// === impl Held ===

impl Held {
    /// None yet; those where pods' connects are sent already are to come.
    pub(super) fn of(inside: &Inside) -> Self {
        Self { expected: inside.namespaces(), ..Self::default() }
    }

    /// Copies of the sockets in `others`, and of all that listen inside pods: what the agent after this one gets.
    pub(super) fn beside(&self, others: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
        let held = self.lock();
        let inside = held.values().flat_map(|of_pod| &of_pod.sockets).map(|socket| socket.as_fd());
        let all = others.iter().map(AsFd::as_fd).chain(inside);
        all.map(|socket| socket.try_clone_to_owned()).collect()
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
        if let Some(before) = self.lock().insert(netns, sockets) {
            before.closed.cancel();
        }
    }

    fn remove(&self, netns: u64) {
        if let Some(of_pod) = self.lock().remove(&netns) {
            of_pod.closed.cancel();
        }
    }

    fn has(&self, netns: u64) -> bool {
        self.lock().contains_key(&netns)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Sockets>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Paths ===

impl Paths {
    /// How `pod`'s connections reach the agent, and why.
    pub(super) fn of(&self, pod: &Pod) -> String {
        let Some((sandboxes, path)) = self.0.get() else { return "node".to_owned() };
        let otherwise = if *path == Path::PodLocal { "denied" } else { "node" };
        match sandboxes.of(pod) {
            None => format!("{otherwise}: no cgroup of the pod was seen"),
            Some(state @ State::Ready { .. }) => format!("pod-local: {state}"),
            Some(state @ State::Without(Reason::HostNetwork)) => format!("node: {state}"),
            Some(state) => format!("{otherwise}: {state}"),
        }
    }
}

// === impl Insides ===

impl Insides {
    /// Follows the pods' sandboxes until the drain begins.
    pub(super) fn start(
        self,
        parts: &Parts,
        (registry, knowledge): (&mut Registry, &Knowledge),
        inherited: Vec<std::net::TcpListener>,
        (drain, tasks): (Drain, &mut JoinSet<()>),
    ) -> Result<(), Error> {
        let asked = sandboxes::Config { cgroup: parts.cgroup.clone(), sweep: SWEEP };
        let metrics = sandboxes::Metrics::register(registry);
        let (sandboxes, reader) = Sandboxes::new(asked, knowledge.pods.clone(), inherited, metrics)
            .map_err(Error::Sandboxes)?;
        // Set once, here.
        let _ = knowledge.paths.0.set((reader, self.otherwise));
        let (sender, events) = mpsc::channel(64);
        tasks.spawn(self.follow(events, drain.clone()));
        tasks.spawn(sandboxes.run(sender, drain));
        Ok(())
    }

    /// Does what `events` say until the drain begins. What this agent listens on then stays open as long as it
    /// drains; the kernel's list stays for the next one.
    async fn follow(self, mut events: mpsc::Receiver<Event>, mut drain: Drain) {
        let mut settled = pin!(sleep(SETTLED));
        let mut tidied = false;
        loop {
            tokio::select! {
                () = drain.started() => return,
                () = settled.as_mut(), if !tidied => {
                    self.tidy();
                    tidied = true;
                }
                event = events.recv() => match event {
                    Some(Event::Opened(listener)) => self.open(listener).await,
                    Some(Event::Closed { netns, .. }) => self.close(netns),
                    None => return,
                },
            }
        }
    }

    async fn open(&self, listener: Listener) {
        let Listener { pod, netns, sockets, .. } = listener;
        let mut ports = InsidePorts::default();
        let mut listening = Vec::new();
        for socket in sockets {
            let address = socket.local_addr();
            match TcpListener::from_std(socket).and_then(|socket| Ok((socket, address?))) {
                Ok((socket, address)) => {
                    let port = if address.is_ipv4() { &mut ports.v4 } else { &mut ports.v6 };
                    *port = address.port();
                    listening.push(Arc::new(socket));
                }
                Err(failure) => {
                    error!(error = %failure, pod.uid = %pod, "Socket inside a pod is of no use")
                }
            }
        }
        let closed = CancellationToken::new();
        for socket in &listening {
            let resolver =
                InsideResolver::new(self.flows.clone(), self.cgroups.clone(), pod.clone(), netns);
            let listener = serve::Listener {
                socket: socket.clone(),
                resolver: Arc::new(resolver),
                closed: closed.clone(),
            };
            // Refused only when the drain has begun.
            let _ = self.serve.send(listener).await;
        }
        match self.inside.publish(netns, ports, &listening) {
            Ok(()) => debug!(pod.uid = %pod, ?ports, "Listening inside a pod"),
            Err(failure) => {
                error!(error = %failure, pod.uid = %pod, "Pod's connects don't go to the listener inside it");
            }
        }
        self.held.insert(netns, Sockets { sockets: listening, closed });
    }

    /// Takes out of the kernel's list what an agent that crashed left there and this one does not listen in: until
    /// now it was denied.
    fn tidy(&self) {
        for netns in self.inside.namespaces() {
            if !self.held.has(netns) {
                self.close(netns);
            }
        }
    }

    fn close(&self, netns: u64) {
        if let Err(failure) = self.inside.withdraw(netns) {
            error!(error = %failure, "Pods' listener is still in the kernel's list");
        }
        self.held.remove(netns);
    }
}

//! Keeps the pod listeners: publishes pods' network namespaces and their listeners to the kernel, has them served,
//! and withdraws them when their pods go.

mod paths;

use std::{
    collections::HashMap,
    io,
    mem::replace,
    os::fd::{AsFd as _, OwnedFd},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use dashmap::DashMap;
use kiam_common::client::Sandbox;
use tokio::{
    join,
    net::TcpListener,
    runtime::Handle,
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error};

pub use self::paths::Paths;
use kiam_core::{lifecycle::Drain, pods::PodUid, ticks::ticks};
use kiam_kernel::{
    identity::{CgroupPaths, PodListenerResolver},
    intercept::{Flows, SandboxTable},
    sandboxes::{self, Event, OpenSandbox, Sandboxes},
};
use kiam_requests::serve;

/// How long after the start it is certain which pods have listeners, and after sockets were passed to a successor that this
/// one is superseded or the successor given up.
const SETTLED: Duration = Duration::from_secs(30);
/// How often the kernel's table is compared with the open listeners while two agents may write it, in a takeover: the last to
/// write need not be the one that stays.
const COMPARE: Duration = Duration::from_millis(100);
/// The same while nobody else has a reason to write the table.
const RECHECK: Duration = Duration::from_secs(10);
/// How long an agent that takes over may take to listen inside all pods.
const ADOPTION: Duration = Duration::from_secs(1);

/// What serves pods inside their network namespaces.
pub struct PodListeners {
    /// The kernel's table of network namespaces.
    pub table: SandboxTable,
    /// Who opened which connection.
    pub flows: Flows,
    /// Whose the cgroups are.
    pub cgroups: CgroupPaths,
    /// Where listeners are served.
    pub serve: mpsc::Sender<serve::Listener>,
    /// The listeners that are open.
    pub open: OpenListeners,
    /// Notified when another agent that wrote the table is superseded or has ended: it closes the listeners that it opened in
    /// pods meanwhile.
    pub republish: Arc<Notify>,
}

/// The pods' network namespaces, by cookie, with their open pod listeners. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct OpenListeners {
    by_netns: Arc<DashMap<u64, Sockets>>,
    /// Notified when a successor gets the sockets: it writes the table from then on.
    contested: Arc<Notify>,
    /// Where the kernel sends connects, to this agent or another one.
    table: Option<SandboxTable>,
}

/// The pod listeners of one network namespace.
#[derive(Debug)]
struct Sockets {
    sockets: Vec<Arc<TcpListener>>,
    sandbox: Sandbox,
    passed: Arc<AtomicBool>,
    closed: CancellationToken,
}

// === impl OpenListeners ===

impl OpenListeners {
    /// None yet. They will be published in `table`.
    #[must_use]
    pub fn published_in(table: SandboxTable) -> Self {
        Self { table: Some(table), ..Self::default() }
    }

    /// Copies of `others` and of all pod listeners: what the successor receives.
    ///
    /// # Errors
    ///
    /// The system gives no descriptors.
    pub fn copies_with(&self, others: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
        let mut all: Vec<_> = others.iter().map(OwnedFd::try_clone).collect();
        for of_pod in self.by_netns.iter() {
            all.extend(of_pod.sockets.iter().map(|socket| socket.as_fd().try_clone_to_owned()));
            of_pod.passed.store(true, Ordering::Relaxed);
        }
        self.contested.notify_one();
        all.into_iter().collect()
    }

    /// Waits, for [`ADOPTION`] at most, until this agent listens wherever the kernel sends connects now. An agent that crashed may
    /// have left entries of pods that are gone.
    pub async fn cover_table(&self) {
        let Some(table) = &self.table else { return };
        let namespaces = table.namespaces();
        let is_covered = |netns: &u64| self.has(*netns) || table.get(*netns).is_none();
        let all = async {
            while !namespaces.iter().all(is_covered) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(ADOPTION, all).await.is_err() {
            debug!("Some of the pods that an earlier agent listened inside of are gone");
        }
    }

    fn insert(&self, netns: u64, sockets: Sockets) {
        if let Some(before) = self.by_netns.insert(netns, sockets) {
            before.closed.cancel();
        }
    }

    fn remove(&self, netns: u64) {
        if let Some((_, of_pod)) = self.by_netns.remove(&netns) {
            of_pod.closed.cancel();
        }
    }

    fn has(&self, netns: u64) -> bool {
        self.by_netns.contains_key(&netns)
    }
}

// === impl PodListeners ===

impl PodListeners {
    /// Follows `sandboxes` until the drain begins, on a real-time thread, as long as what is returned is polled.
    ///
    /// # Errors
    ///
    /// The system gives no thread.
    pub fn start(
        self,
        sandboxes: Sandboxes,
        drain: Drain,
    ) -> Result<impl Future<Output = ()> + Send + 'static, sandboxes::Error> {
        let (sender, events) = mpsc::channel(64);
        let follow = self.follow(events, Handle::current(), drain.clone());
        // A pod's first connect may be on its way.
        sandboxes::on_realtime_thread(async {
            join!(follow, sandboxes.run(sender, drain));
        })
    }

    /// Handles `events` until the drain begins. The listeners then stay open as long as this agent drains, and the kernel's
    /// table stays for the next one. The runtime that serves is `serving`.
    async fn follow(self, mut events: mpsc::Receiver<Event>, serving: Handle, mut drain: Drain) {
        let mut settled = pin!(sleep(SETTLED));
        let (mut tidied, mut contested) = (false, true);
        let mut compare = ticks(COMPARE);
        loop {
            tokio::select! {
                biased;
                () = drain.started() => return,
                _ = compare.tick() => self.compare(),
                () = self.republish.notified() => self.compare(),
                () = self.open.contested.notified() => {
                    settled.as_mut().reset(Instant::now() + SETTLED);
                    (contested, compare) = (true, ticks(COMPARE));
                }
                () = settled.as_mut(), if contested => {
                    if !replace(&mut tidied, true) {
                        self.tidy();
                    }
                    (contested, compare) = (false, ticks(RECHECK));
                }
                event = events.recv() => match event {
                    Some(Event::Opened(opened)) => self.add(opened, &serving).await,
                    Some(Event::Closed { netns, .. }) => self.close(netns),
                    None => return,
                },
            }
        }
    }

    async fn add(&self, opened: OpenSandbox, serving: &Handle) {
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
                    error!(error = %failure, pod.uid = %pod, "Pod listener can't be used")
                }
            }
        }
        let (passed, closed) = (Arc::default(), CancellationToken::new());
        let sockets = Sockets { sockets: listening, sandbox, passed, closed };
        if !self.send_to_server(&pod, netns, &sockets).await {
            // The drain has begun: the pod is the next agent's.
            return;
        }
        // The sockets listen already: whoever connects now is served in a moment.
        if self.publish(netns, &sockets) {
            match sandbox.v4 {
                0 => debug!(pod.uid = %pod, netns, "Network namespace of a pod known"),
                port => debug!(pod.uid = %pod, netns, port, "Pod listener open"),
            }
        }
        self.open.insert(netns, sockets);
    }

    /// Has `listeners` served; `false` if they are not, since the drain has begun.
    async fn send_to_server(&self, pod: &PodUid, netns: u64, listeners: &Sockets) -> bool {
        for socket in &listeners.sockets {
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
                passed: listeners.passed.clone(),
                closed: listeners.closed.clone(),
            };
            if self.serve.send(listener).await.is_err() {
                return false;
            }
        }
        true
    }

    fn publish(&self, netns: u64, listeners: &Sockets) -> bool {
        let published = self.table.publish(netns, listeners.sandbox, &listeners.sockets);
        if let Err(failure) = &published {
            error!(error = %failure, netns, "Connects from a pod's network namespace don't come to the agent");
        }
        published.is_ok()
    }

    /// Restores entries of the kernel's table that another agent has changed or removed.
    fn compare(&self) {
        let published = self.table.entries().unwrap_or_else(|failure| {
            error!(error = %failure, "The table of pods' network namespaces can't be read; writing it again");
            HashMap::new()
        });
        for listeners in self.open.by_netns.iter() {
            let netns = *listeners.key();
            if published.get(&netns) != Some(&listeners.sandbox) && self.publish(netns, &listeners)
            {
                debug!(netns, "Restored a pod's network namespace in the kernel's table");
            }
        }
    }

    /// Removes entries from the kernel's table that an agent which crashed left, and where this one does not listen. Until now
    /// their connects were denied.
    fn tidy(&self) {
        for netns in self.table.namespaces() {
            if !self.open.has(netns) {
                self.close(netns);
            }
        }
    }

    fn close(&self, netns: u64) {
        if let Err(failure) = self.table.withdraw(netns) {
            error!(error = %failure, "A network namespace that is no longer a pod's stays in the kernel's table");
        }
        self.open.remove(netns);
    }
}

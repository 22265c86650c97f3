//! The task that owns the state: it takes changes, scans pods, and reports their pod listeners.

mod rest;
mod sweep;

use std::{
    collections::{HashMap, VecDeque},
    net::TcpListener,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep},
};
use tracing::warn;

use self::rest::ticks;
use super::{
    Config, Error, Event, Metrics, NoListenerReason, SCANS_AT_ONCE, SandboxReader, State,
    claims::Claims,
    sandbox::{Record, Sandbox},
    scan::{Scan, ScanResult},
    watch::{Change, Watch},
};
use crate::realtime::ordinary;
use kiam_core::{
    lifecycle::{Drain, Latch},
    pods::{PodReader, PodUid},
};

/// The number of pauses before an unsettled pod is scanned again: 1, 2, 4 … 4,096 ms, eight seconds in all. The runtime
/// starts on the node's network, and no event shows its step into the pod's. On a node where everything starts at once
/// this may take seconds.
const RETRIES: u32 = 13;
/// The time during which changes of the pods' records are collected.
const COLLECT: Duration = Duration::from_millis(100);
/// The interval of checks whether the pods' cgroup was recreated, while the folders above it can't be watched.
const ROOT: Duration = Duration::from_millis(100);
/// The interval of sweeps for cgroups that can't be watched.
const CATCH_UP: Duration = Duration::from_secs(2);

/// The task that follows the pods' sandboxes.
#[derive(Debug)]
pub struct Sandboxes {
    watch: Watch,
    pods: HashMap<PodUid, Sandbox>,
    records: PodReader,
    claims: Claims,
    states: SandboxReader,
    metrics: Metrics,
    sweep: Duration,
    listens: bool,
    tasks: JoinSet<TaskResult>,
    /// Two limits, so that ordinary scans do not delay urgent ones.
    urgent: Arc<Semaphore>,
    ordinary: Arc<Semaphore>,
    /// Distinguishes a pod's cgroup from an earlier one of the same UID.
    births: u64,
    outbox: VecDeque<Event>,
    /// Completed sweeps. After the second one, inherited listeners without a pod are closed.
    sweeps: u32,
    /// Whether it was logged that pods' processes can't be seen.
    logged_hidden: bool,
    watched: Latch,
    /// The last published number of missing watches.
    unwatched: Option<u64>,
}

/// The result of a background task.
#[derive(Debug)]
enum TaskResult {
    /// The end of a scan; without a result if it panicked.
    Scanned { pod: PodUid, birth: u64, asked: Instant, took: Duration, found: Option<ScanResult> },
    /// The end of a pod's rest after a scan.
    Rested { pod: PodUid, birth: u64 },
    /// The end of a pause before another scan.
    Paused { pod: PodUid, birth: u64 },
    /// The end of a pause after a change of records.
    Collected,
}

/// An event of the task's loop.
enum LoopEvent {
    Changes(Vec<Change>),
    Done(TaskResult),
    Records,
    Root,
    Sweep,
    CatchUp,
    Drain,
}

// === impl Sandboxes ===

impl Sandboxes {
    /// A task for the pods below `config.cgroup`. `records` has their addresses. `inherited` are the previous agent's
    /// listeners, which are reused in their namespaces. `states` is updated with the state of each pod.
    ///
    /// The namespace of the calling thread is the node's.
    ///
    /// # Errors
    ///
    /// [`Error`]: without /proc, or below kernel 5.14 with inherited listeners.
    pub fn new(
        config: Config,
        records: PodReader,
        inherited: Vec<TcpListener>,
        metrics: Metrics,
        states: SandboxReader,
    ) -> Result<Self, Error> {
        Ok(Self {
            watch: Watch::new(config.cgroup.path().to_owned()),
            pods: HashMap::new(),
            records,
            claims: Claims::new(inherited).map_err(Error::Namespaces)?,
            states,
            metrics,
            sweep: config.sweep,
            listens: config.listens,
            tasks: JoinSet::new(),
            urgent: Arc::new(Semaphore::new(SCANS_AT_ONCE)),
            ordinary: Arc::new(Semaphore::new(SCANS_AT_ONCE)),
            births: 0,
            outbox: VecDeque::new(),
            sweeps: 0,
            logged_hidden: false,
            watched: config.watched,
            unwatched: None,
        })
    }

    /// Runs until the drain begins, or the receiver of `events` is gone. No event is dropped: the task waits for the
    /// receiver.
    pub async fn run(mut self, events: mpsc::Sender<Event>, mut drain: Drain) {
        let mut records = self.records.changes();
        // The first sweep is immediate, and finds the existing pods.
        let (mut root, mut sweep) = (ticks(ROOT, ROOT), ticks(Duration::ZERO, self.sweep));
        let mut catch_up = ticks(CATCH_UP, CATCH_UP);
        let mut collecting = false;
        loop {
            let turn = tokio::select! {
                () = drain.started() => LoopEvent::Drain,
                changes = self.watch.changes() => LoopEvent::Changes(changes),
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => LoopEvent::Done(done),
                    // No task is aborted, and panics of scans are caught.
                    Err(_) => continue,
                },
                true = changed(&mut records), if !collecting => LoopEvent::Records,
                _ = sweep.tick() => LoopEvent::Sweep,
                _ = root.tick(), if !self.watch.is_root_watched() => LoopEvent::Root,
                _ = catch_up.tick(), if self.watch.refused() > 0 => LoopEvent::CatchUp,
            };
            match turn {
                LoopEvent::Drain => return,
                LoopEvent::Changes(changes) => self.take(changes),
                LoopEvent::CatchUp => {
                    let changes = self.watch.catch_up();
                    self.take(changes);
                }
                LoopEvent::Done(TaskResult::Scanned { pod, birth, asked, took, found }) => {
                    self.scanned(&pod, birth, (asked, took), found);
                }
                LoopEvent::Done(TaskResult::Rested { pod, birth }) => self.rested(&pod, birth),
                LoopEvent::Done(TaskResult::Paused { pod, birth }) => self.rescan(&pod, birth),
                LoopEvent::Done(TaskResult::Collected) => collecting = false,
                LoopEvent::Records => {
                    collecting = true;
                    self.tasks.spawn(async {
                        sleep(COLLECT).await;
                        TaskResult::Collected
                    });
                    self.follow_records();
                }
                LoopEvent::Root if self.watch.is_moved() => self.sweep(),
                LoopEvent::Root => {}
                LoopEvent::Sweep => {
                    let changes = self.watch.sweep();
                    self.take(changes);
                    self.sweeps += 1;
                    if self.sweeps == 2 {
                        self.claims.drop_inherited();
                    }
                }
            }
            self.show_watched();
            while let Some(event) = self.outbox.pop_front() {
                tokio::select! {
                    sent = events.send(event) => if sent.is_err() { return },
                    () = drain.started() => return,
                }
            }
        }
    }

    fn show_watched(&mut self) {
        let missing = self.watch.refused();
        if self.unwatched.replace(missing) != Some(missing) {
            self.metrics.unwatched.set(i64::try_from(missing).unwrap_or(i64::MAX));
            if missing == 0 { self.watched.set() } else { self.watched.clear() }
        }
    }

    fn take(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Created(pod, cgroup) => self.made(pod, cgroup),
                Change::Members(pod) => self.members_changed(&pod),
                Change::Swept(pod) => self.swept(&pod),
                Change::Moved => self.sweep(),
                Change::FirstProcess(pod) => self.first_process(&pod),
                Change::Removed(pod) => self.removed(&pod),
                Change::Lost => {
                    warn!("Changes of pods' cgroups were lost, so all of them are scanned");
                    self.metrics.lost.inc();
                    self.sweep();
                }
            }
        }
    }

    fn made(&mut self, pod: PodUid, cgroup: PathBuf) {
        self.removed(&pod);
        self.births += 1;
        // Pods that the first sweep finds are older.
        let came = (self.sweeps > 0).then(Instant::now);
        let sandbox = Sandbox::new(self.births, came, cgroup);
        self.pods.insert(pod.clone(), sandbox);
        self.states.set(&pod, State::Waiting);
        self.members_changed(&pod);
    }

    fn removed(&mut self, pod: &PodUid) {
        let Some(mut sandbox) = self.pods.remove(pod) else { return };
        self.states.remove(pod);
        self.closed(sandbox.close(pod));
    }

    fn members_changed(&mut self, pod: &PodUid) {
        if let Some(sandbox) = self.pods.get_mut(pod) {
            sandbox.attempt = 0;
            self.scan(pod);
        }
    }

    /// Each of the kubelet's exec probes joins a container. Only the first process matters.
    fn first_process(&mut self, pod: &PodUid) {
        if self.pods.get(pod).is_some_and(|sandbox| sandbox.reported.is_empty()) {
            self.members_changed(pod);
        }
    }

    /// Scans the pods whose namespace was another pod's: it may be free now.
    fn scan_refused(&mut self) {
        let is_refused =
            |sandbox: &Sandbox| matches!(sandbox.refusal, Some(NoListenerReason::AnotherPods(_)));
        let refused = self.pods.iter().filter(|(_, sandbox)| is_refused(sandbox));
        let refused: Vec<PodUid> = refused.map(|(uid, _)| uid.clone()).collect();
        refused.iter().for_each(|pod| self.scan(pod));
    }

    fn follow_records(&mut self) {
        let records = &self.records;
        let changed = self.pods.iter().filter(|(uid, sandbox)| {
            Record::of(records, uid).is_some_and(|record| record != sandbox.record)
        });
        let changed: Vec<PodUid> = changed.map(|(uid, _)| uid.clone()).collect();
        changed.iter().for_each(|pod| self.members_changed(pod));
    }

    /// Begins a scan, or records that another one is due after the current one.
    fn scan(&mut self, pod: &PodUid) {
        let Some(sandbox) = self.pods.get_mut(pod) else { return };
        if sandbox.scanning {
            sandbox.again = true;
            return;
        }
        // A pod that was deleted in the API keeps its last record.
        if let Some(record) = Record::of(&self.records, pod) {
            sandbox.record = record;
        }
        if sandbox.record.host_network {
            self.refuse_host_network(pod);
            return;
        }
        let urgent = sandbox.is_urgent();
        let rest = sandbox.rests_until.saturating_duration_since(Instant::now());
        if !urgent && !rest.is_zero() {
            self.rest(pod, rest);
            return;
        }
        sandbox.scanning = true;
        let scan = Scan {
            pod: pod.clone(),
            cgroup: sandbox.cgroup.clone(),
            held: std::mem::take(&mut sandbox.held),
            addresses: sandbox.record.addresses.clone(),
            urgent,
            listens: self.listens,
            claims: self.claims.clone(),
        };
        let (pod, birth, asked) = (pod.clone(), sandbox.birth, Instant::now());
        let limit = Arc::clone(if urgent { &self.urgent } else { &self.ordinary });
        self.tasks.spawn(async move {
            let permit = limit.acquire_owned().await;
            let begun = Instant::now();
            let run = move || if urgent { scan.run() } else { ordinary(|| scan.run()) };
            let found = spawn_blocking(run).await.ok();
            drop(permit);
            TaskResult::Scanned { pod, birth, asked, took: begun.elapsed(), found }
        });
    }

    fn refuse_host_network(&mut self, pod: &PodUid) {
        let Some(sandbox) = self.pods.get_mut(pod) else { return };
        let events = sandbox.close(pod);
        self.states.set_namespaces(pod, &[], false);
        self.states.set(pod, State::Without(NoListenerReason::HostNetwork));
        self.closed(events);
    }

    /// Queues the events. Freed namespaces may now be other pods'.
    fn closed(&mut self, events: Vec<Event>) {
        if !events.is_empty() {
            self.outbox.extend(events);
            self.scan_refused();
        }
    }

    fn scanned(
        &mut self,
        pod: &PodUid,
        birth: u64,
        (asked, took): (Instant, Duration),
        found: Option<ScanResult>,
    ) {
        // The pod is gone or was recreated. The result is dropped, which was not reported.
        let Some(sandbox) = self.pods.get_mut(pod).filter(|sandbox| sandbox.birth == birth) else {
            drop(found);
            return self.scan_refused();
        };
        sandbox.scanning = false;
        sandbox.record_scan(took);
        let found = found.unwrap_or_else(ScanResult::panicked);
        if !found.any {
            sandbox.seen = None;
        } else if sandbox.reported.is_empty() {
            sandbox.seen.get_or_insert(asked);
        }
        if !found.opened.is_empty()
            && let Some(seen) = sandbox.seen.take()
        {
            self.metrics.ready.observe(seen.elapsed().as_secs_f64());
        }
        let (events, freed) = sandbox.take(pod, found.held, found.opened);
        self.outbox.extend(events);
        // Before the events are sent: a connect may be on its way then.
        self.states.set_namespaces(pod, &sandbox.reported, !sandbox.record.addresses.is_empty());
        let again = std::mem::take(&mut sandbox.again);
        let pause = found.unsettled && !again && sandbox.attempt < RETRIES;
        if found.reason == NoListenerReason::Hidden
            && !std::mem::replace(&mut self.logged_hidden, true)
        {
            warn!(pod.uid = %pod, "Pods are denied: the agent can't see their processes; run the agent with hostPID");
        }
        let state = sandbox.state(found.reason, again || pause);
        self.states.set(pod, state);
        if pause {
            let (pod, pause) = (pod.clone(), Duration::from_millis(1 << sandbox.attempt));
            sandbox.attempt += 1;
            self.tasks.spawn(async move {
                sleep(pause).await;
                TaskResult::Paused { pod, birth }
            });
        }
        drop(found.closed);
        if freed || found.released {
            self.scan_refused();
        }
        if again {
            self.scan(pod);
        }
    }
}

/// Waits for a change of records, for ever once the writer is gone.
async fn changed(records: &mut watch::Receiver<u64>) -> bool {
    match records.changed().await {
        Ok(()) => true,
        Err(_) => std::future::pending().await,
    }
}

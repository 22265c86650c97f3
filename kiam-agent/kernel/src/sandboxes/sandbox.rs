//! One pod with a cgroup: its network namespaces, and the events sent about them.

use std::{fs, net::IpAddr, os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration};

use tokio::time::Instant;

use super::{
    Event, NoListenerReason, OpenSandbox, State,
    listen::{ListenerSet, VerifiedNamespace},
    scan::ClaimedNamespace,
};
use kiam_core::pods::{PodReader, PodUid};

/// How long scans of a new pod without listeners are urgent: longer than a runtime needs for a sandbox on a busy node.
const HURRY: Duration = Duration::from_secs(10);

/// The rest after a scan of a pod, in multiples of the scan's time: containers can cause scans by changes of their own
/// cgroups, and make them long. A new sandbox does not wait.
const REST_PER_LOOK: u32 = 9;

/// A pod with a cgroup.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) birth: u64,
    /// When the cgroup was created; `None` if it is older than the agent.
    pub(super) came: Option<Instant>,
    pub(super) cgroup: PathBuf,
    /// The cgroup's id; 0, which no cgroup has, if it was gone already.
    pub(super) cgroup_id: u64,
    /// The claimed namespaces; empty during a scan.
    pub(super) held: Vec<ClaimedNamespace>,
    /// The namespaces, by cookie, with an [`Event::Opened`] and no [`Event::Closed`] so far.
    pub(super) reported: Vec<u64>,
    pub(super) record: Record,
    pub(super) scanning: bool,
    /// Whether another scan is due after the current one.
    pub(super) again: bool,
    /// Successive scans that found the pod unsettled.
    pub(super) attempt: u32,
    /// When the first process was noticed; `None` once the pod is ready.
    pub(super) seen: Option<Instant>,
    /// The end of the rest after the last scan.
    pub(super) rests_until: Instant,
    /// Whether a scan is scheduled for the end of the rest.
    pub(super) resting: bool,
    pub(super) refusal: Option<NoListenerReason>,
}

/// The relevant part of the pod's record in the API.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) host_network: bool,
    pub(super) addresses: Vec<IpAddr>,
}

// === impl Sandbox ===

impl Sandbox {
    pub(super) fn new(birth: u64, came: Option<Instant>, cgroup: PathBuf) -> Self {
        Self {
            birth,
            came,
            cgroup_id: fs::metadata(&cgroup).map_or(0, |cgroup| cgroup.ino()),
            cgroup,
            held: Vec::new(),
            reported: Vec::new(),
            record: Record::default(),
            scanning: false,
            again: false,
            attempt: 0,
            seen: None,
            rests_until: Instant::now(),
            resting: false,
            refusal: None,
        }
    }

    /// Whether the first process may connect soon, and there is no pod listener yet.
    pub(super) fn is_urgent(&self) -> bool {
        self.reported.is_empty() && self.came.is_some_and(|came| came.elapsed() < HURRY)
    }

    /// Whether the pod has all that it can have: a pod listener in each of its namespaces, or no need for one.
    pub(super) fn is_settled(&self) -> bool {
        let needs_none = |held: &ClaimedNamespace| {
            matches!(held.listening, Ok(_) | Err(NoListenerReason::NodePath))
        };
        !self.held.is_empty() && self.held.iter().all(needs_none) || self.record.host_network
    }

    /// Starts the rest after a scan that `took` so long.
    pub(super) fn record_scan(&mut self, took: Duration) {
        self.rests_until = Instant::now() + took * REST_PER_LOOK;
    }

    /// Replaces the claimed namespaces by `held`, of which `opened` are new. Returns the events, and whether a namespace was
    /// freed.
    pub(super) fn take(
        &mut self,
        pod: &PodUid,
        held: Vec<ClaimedNamespace>,
        opened: Vec<VerifiedNamespace>,
    ) -> (Vec<Event>, bool) {
        let is_held = |netns: &u64| held.iter().any(|held| held.cookie == *netns);
        let (reported, gone): (Vec<u64>, Vec<u64>) = self.reported.drain(..).partition(is_held);
        self.reported = reported;
        self.held = held;
        let freed = !gone.is_empty();
        let mut events = closed(pod, gone);
        for VerifiedNamespace { cookie: netns, listening } in opened {
            if !self.reported.contains(&netns) {
                self.reported.push(netns);
            }
            let ListenerSet { port, sockets } = listening.unwrap_or_default();
            let (pod, cgroup) = (pod.clone(), self.cgroup_id);
            events.push(Event::Opened(OpenSandbox { pod, cgroup, netns, port, sockets }));
        }
        (events, freed)
    }

    /// Drops all namespaces, and returns the events.
    pub(super) fn close(&mut self, pod: &PodUid) -> Vec<Event> {
        self.held.clear();
        self.refusal = None;
        closed(pod, self.reported.drain(..).collect())
    }

    /// The state after a scan. `due`: another scan follows.
    pub(super) fn state(&mut self, reason: NoListenerReason, due: bool) -> State {
        let is_ready = |held: &&ClaimedNamespace| held.listening.is_ok();
        if let Some(held) = self.held.iter().find(is_ready).or(self.held.first()) {
            self.refusal = None;
            let netns = held.cookie;
            return match &held.listening {
                Ok(port) => State::Ready { netns, port: *port },
                Err(reason) => State::Known { netns, reason: reason.clone() },
            };
        }
        self.refusal = Some(reason.clone());
        if due { State::Waiting } else { State::Without(reason) }
    }
}

fn closed(pod: &PodUid, cookies: Vec<u64>) -> Vec<Event> {
    cookies.into_iter().map(|netns| Event::Closed { pod: pod.clone(), netns }).collect()
}

// === impl Record ===

impl Record {
    /// The record of `pod`; `None` while it is not known.
    pub(super) fn of(records: &PodReader, pod: &PodUid) -> Option<Self> {
        let pod = records.by_uid(pod).ok()?;
        let mut addresses: Vec<_> = pod.addresses.iter().map(IpAddr::to_canonical).collect();
        addresses.sort_unstable();
        Some(Self { host_network: pod.host_network, addresses })
    }
}

//! One pod that has a cgroup: its namespaces, and what was reported of them.

use std::{fs, net::IpAddr, os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration};

use tokio::time::Instant;

use super::{
    Event, NoListenerReason, OpenSandbox, State,
    listen::{ListenerSet, VerifiedNamespace},
    scan::ClaimedNamespace,
};
use kiam_core::pods::{PodReader, PodUid};

/// How long looks at a pod without listeners are hurried: longer than a runtime needs for a sandbox on a busy node.
const HURRY: Duration = Duration::from_secs(10);

/// How long a pod that has been looked at rests, in the time that its look took: containers can ask for looks by what they do
/// to their own cgroups, and make them long. A new sandbox is not kept waiting.
const REST_PER_LOOK: u32 = 9;

/// A pod that has a cgroup.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) birth: u64,
    /// When its cgroup was seen to come; `None`: it was there before.
    pub(super) came: Option<Instant>,
    pub(super) cgroup: PathBuf,
    /// 0, which no cgroup has, when it was gone already.
    pub(super) cgroup_id: u64,
    /// Empty while it is looked at.
    pub(super) held: Vec<ClaimedNamespace>,
    /// The namespaces reported by [`Event::Opened`], by cookie, and not by [`Event::Closed`].
    pub(super) reported: Vec<u64>,
    pub(super) record: Record,
    pub(super) scanning: bool,
    /// Something happened while it was looked at.
    pub(super) again: bool,
    /// Looks in a row that found it unsettled.
    pub(super) attempt: u32,
    /// When its first process was noticed, until it is ready.
    pub(super) seen: Option<Instant>,
    /// When it may be looked at again, unless it is urgent.
    pub(super) rests_until: Instant,
    /// A look is due then.
    pub(super) resting: bool,
    pub(super) refusal: Option<NoListenerReason>,
}

/// What the API says of a pod, as far as it matters here.
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

    /// Whether its first process may connect in a moment, and nothing listens for that yet.
    pub(super) fn is_urgent(&self) -> bool {
        self.reported.is_empty() && self.came.is_some_and(|came| came.elapsed() < HURRY)
    }

    /// Was looked at for so long, and rests now.
    pub(super) fn record_scan(&mut self, took: Duration) {
        self.rests_until = Instant::now() + took * REST_PER_LOOK;
    }

    /// Has `held` from now on, of which `opened` are new. What there is to tell, and whether something is free now.
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

    /// Has none any more, nor anything to wait for.
    pub(super) fn close(&mut self, pod: &PodUid) -> Vec<Event> {
        self.held.clear();
        self.refusal = None;
        closed(pod, self.reported.drain(..).collect())
    }

    /// Where it stands after a look, which another one will follow if it is `due`.
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
    /// `None` while the API's is not known.
    pub(super) fn of(records: &PodReader, pod: &PodUid) -> Option<Self> {
        let pod = records.by_uid(pod).ok()?;
        let mut addresses: Vec<_> = pod.addresses.iter().map(IpAddr::to_canonical).collect();
        addresses.sort_unstable();
        Some(Self { host_network: pod.host_network, addresses })
    }
}

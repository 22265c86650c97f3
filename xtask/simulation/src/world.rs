//! The fleet in virtual time: a queue of events, and what the agents do at each.
//!
//! When something is due, how long to wait after an error and what a node may ask are the agent's own functions; they
//! draw from this thread's generator, so a seed decides everything.

mod agents;
mod pods;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::Duration,
};

use kiam_core::{credentials::Pace, rate::Bucket};
use tokio::time::Instant;

use crate::{
    account::{Account, Answer},
    fleet::{Fleet, Policy},
    plan::{Plan, Start},
    tally::{Millis, Tally},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A session is to be asked for; void if it was planned anew since.
    Due {
        session: u32,
        plan: u32,
    },
    /// STS has answered; void if the session is another one by now.
    Answered {
        session: u32,
        identity: u32,
        answer: Answer,
        asked: Millis,
    },
    /// A node may ask again.
    Resume {
        node: u32,
    },
    /// A pod comes to a node for the first time, or an agent to its own session.
    Arrive {
        session: u32,
    },
    /// A pod is replaced.
    Replace {
        pod: u32,
    },
    /// The next pod's life ends.
    Die,
    Rollout,
    Restart {
        node: u32,
    },
}

/// One session of one node.
#[derive(Clone, Debug, Default)]
struct Session {
    /// When what is held expires; nothing is held before the first time.
    expires: Millis,
    due: Millis,
    plan: u32,
    identity: u32,
    failures: u32,
    in_flight: bool,
    queued: bool,
    pods: u32,
    unwanted_since: Millis,
    wanted_since: Millis,
}

#[derive(Clone, Debug, Default)]
struct Node {
    bucket: Bucket,
    pace: Pace,
    in_flight: u32,
    queue: VecDeque<u32>,
    resuming: bool,
    /// Sessions that a restarted agent does not have yet.
    missing: u32,
}

/// The simulation.
pub(crate) struct World {
    fleet: Fleet,
    policy: Policy,
    plan: Plan,
    now: Millis,
    base: Instant,
    account: Account,
    events: BinaryHeap<Reverse<(Millis, Event)>>,
    nodes: Vec<Node>,
    sessions: Vec<Session>,
    /// The session that each pod uses.
    pods: Vec<u32>,
    /// The node whose restart is next.
    next_restart: u32,
    restarted_at: Option<Millis>,
    tally: Tally,
}

/// What there is to know at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) tally: Tally,
    /// Wanted and not held, still.
    pub(crate) bare: u32,
    /// When the last restart was over.
    pub(crate) restarted_at: Option<Millis>,
}

/// Simulates `plan` by `seed`.
pub(crate) fn simulate(fleet: Fleet, policy: Policy, plan: Plan, seed: u64) -> Outcome {
    fastrand::seed(seed);
    let mut world = World::new(fleet, policy, plan);
    world.begin();
    world.run();
    world.outcome()
}

// === impl World ===

impl World {
    fn new(fleet: Fleet, policy: Policy, plan: Plan) -> Self {
        let base = Instant::now();
        let outage = plan.outage.clone();
        let sessions = fleet.nodes * fleet.sessions(&policy);
        Self {
            account: Account::new(fleet.account_rate(), base, outage),
            now: 0,
            base,
            events: BinaryHeap::new(),
            nodes: vec![Node::default(); fleet.nodes as usize],
            sessions: vec![Session::default(); sessions as usize],
            pods: vec![0; (fleet.nodes * fleet.pods) as usize],
            next_restart: 0,
            restarted_at: None,
            tally: Tally::default(),
            fleet,
            policy,
            plan,
        }
    }

    fn instant(&self) -> Instant {
        self.instant_of(self.now)
    }

    fn instant_of(&self, time: Millis) -> Instant {
        self.base + Duration::from_millis(time)
    }

    fn at(&mut self, time: Millis, event: Event) {
        self.events.push(Reverse((time, event)));
    }

    fn run(&mut self) {
        let end = millis(self.plan.until);
        while let Some(Reverse((time, event))) = self.events.pop() {
            if time >= end {
                break;
            }
            debug_assert!(time >= self.now, "time goes on");
            self.now = time;
            self.happen(event);
        }
        self.now = end;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Due { session, plan } => self.due(session, plan),
            Event::Answered { session, identity, answer, asked } => {
                self.answered((session, identity), answer, asked);
            }
            Event::Resume { node } => {
                self.nodes[node as usize].resuming = false;
                self.ask(node);
            }
            Event::Arrive { session } => self.want(session),
            Event::Replace { pod } => self.replace(pod),
            Event::Die => {
                self.replace(fastrand::u32(0..self.fleet.nodes * self.fleet.pods));
                self.plan_death();
            }
            Event::Rollout => self.roll_out(),
            Event::Restart { node } => self.restart(node),
        }
    }

    /// Puts pods on the nodes, and plans what is to happen.
    fn begin(&mut self) {
        let Fleet { nodes, pods, .. } = self.fleet;
        for node in 0..nodes {
            let (agent, arrivals) = match self.plan.start {
                Start::Steady => (0, 0),
                Start::Cold(agents, arrivals) => (random(millis(agents)), millis(arrivals)),
            };
            let start = self.now + agent;
            if self.policy.chained {
                let last = self.first(node) + self.fleet.pods_sessions(self.policy.name);
                self.begin_with(last, start);
            }
            for pod in node * pods..(node + 1) * pods {
                // Round-robin at first, so that each role is used.
                let session = self.first(node) + pod % self.fleet.pods_sessions(self.policy.name);
                self.pods[pod as usize] = session;
                self.begin_with(session, start + random(arrivals));
            }
        }
        if self.plan.churn.is_some() {
            self.plan_death();
            self.at(self.now, Event::Rollout);
        }
        if let Some(rolling) = self.plan.rolling {
            (0..rolling.surge.min(nodes)).for_each(|_| self.restart_next());
        }
    }

    /// The first session of a node.
    fn first(&self, node: u32) -> u32 {
        node * self.fleet.sessions(&self.policy)
    }

    fn node_of(&self, session: u32) -> u32 {
        session / self.fleet.sessions(&self.policy)
    }

    /// Somebody wants `session` from `at` on, or has had it since before.
    fn begin_with(&mut self, session: u32, at: Millis) {
        if self.plan.start != Start::Steady {
            return self.at(at, Event::Arrive { session });
        }
        let (life, renewal) = (millis(self.policy.duration), millis(self.policy.renewal()));
        let held = &mut self.sessions[session as usize];
        held.pods += 1;
        if held.pods == 1 {
            let age = random(renewal);
            held.expires = self.now + life - age;
            self.schedule(session, self.now + renewal - age);
        }
    }

    fn outcome(self) -> Outcome {
        let bare = self.sessions.iter().filter(|it| it.pods > 0 && it.expires <= self.now).count();
        Outcome {
            tally: self.tally,
            bare: u32::try_from(bare).expect("there are fewer sessions than numbers"),
            restarted_at: self.restarted_at,
        }
    }
}

pub(crate) fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).expect("a simulation ends within its numbers")
}

/// Less than `end`, or 0.
fn random(end: Millis) -> Millis {
    if end == 0 { 0 } else { fastrand::u64(0..end) }
}

//! The lab's pods and processes, and playing rows with them.

use std::{collections::BTreeMap, net::IpAddr, thread, time::Duration};

use lab::{
    Agent, Arrivals, Attacker, Cgroup, Lab, LabPod, PodSpec,
    pod_client::{
        Attempt, Options,
        attack::{Attack, stream::Way},
    },
};
use tokio::time::Instant;

use crate::{
    PASSES, eventually,
    judge::{Answer, Expect, Outcome, State, Verdict},
    rows::{Act, IMDS, Row},
};

/// How long a step may take where an answer must come, and where none should, in milliseconds.
const PATIENT: u64 = 5000;
const IMPATIENT: u64 = 250;
/// When something has come, nothing more must come for so long before the next attempt.
const QUIET: Duration = Duration::from_millis(30);
const MOST_WAITS: usize = 100;
/// How long after a freeze the lease is good for certain, with time for one more row; it ends after 10 s.
const LEASE: Duration = Duration::from_secs(6);
/// The lease is renewed each second, which shows nowhere.
const RENEWED: Duration = Duration::from_millis(1500);
/// How many connections from before an attach are kept: one for each time that the rows are played after it.
const EARLY: usize = PASSES + 8;

/// Who is on the node.
pub(crate) struct Cast {
    pub(crate) pod: LabPod,
    /// Another, which has the first one's address too, of its own making.
    pub(crate) thief: LabPod,
    /// One on the host's network.
    pub(crate) host_pod: LabPod,
    /// A host daemon's cgroup, outside the pods'.
    pub(crate) daemon: Cgroup,
}

/// Who tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    Pod,
    Thief,
    HostPod,
    Host,
}

pub(crate) struct Stage<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) cast: &'a Cast,
    pub(crate) state: State,
    rows: &'a [Row],
    attackers: BTreeMap<Who, Attacker>,
    /// Those that connect before the agent attaches.
    early: BTreeMap<Who, Attacker>,
    arrivals: Arrivals,
    frozen: Instant,
}

// === impl Cast ===

impl Cast {
    pub(crate) const ROLE: &str = "orders";
    pub(crate) const THIEFS_ROLE: &str = "reports";
    pub(crate) const HOST_PODS_ROLE: &str = "node-tools";

    pub(crate) fn assemble(lab: &Lab) -> Self {
        let make = |spec| {
            let pod = lab.unpublished_pod(spec).unwrap();
            lab.publish(&pod);
            pod
        };
        let pod = make(PodSpec::new("shop", "orders").role(Self::ROLE));
        let thief = make(PodSpec::new("shop", "thief").role(Self::THIEFS_ROLE));
        let spec = PodSpec::new("kube-system", "tools").role(Self::HOST_PODS_ROLE);
        let host_pod = make(spec.host_network());
        thief.forge_address(pod.v4()).unwrap();
        for pod in [&pod, &thief, &host_pod] {
            // As container runtimes set it: everybody may ping.
            pod.netns().sysctl("ipv4/ping_group_range", "0 2147483647").unwrap();
        }
        let daemon = lab.node.root_cgroup().join("system.slice/daemon.service");
        Self { pod, thief, host_pod, daemon: Cgroup::create(daemon).unwrap() }
    }

    pub(crate) fn of(&self, who: Who) -> &LabPod {
        match who {
            Who::Pod => &self.pod,
            Who::Thief => &self.thief,
            Who::HostPod | Who::Host => &self.host_pod,
        }
    }
}

// === impl Who ===

impl Who {
    pub(crate) fn role(self) -> &'static str {
        match self {
            Self::Pod => Cast::ROLE,
            Self::Thief => Cast::THIEFS_ROLE,
            Self::HostPod | Self::Host => Cast::HOST_PODS_ROLE,
        }
    }

    /// A new process of its.
    pub(crate) fn attacker(self, lab: &Lab, cast: &Cast) -> Attacker {
        match self {
            Self::Host => lab.node.attacker(),
            pod => cast.of(pod).attacker(),
        }
        .unwrap()
    }
}

// === impl Stage ===

impl<'a> Stage<'a> {
    pub(crate) fn new(lab: &'a Lab, cast: &'a Cast, rows: &'a [Row]) -> Self {
        let all = [Who::Pod, Who::Thief, Who::HostPod, Who::Host];
        Self {
            lab,
            cast,
            state: State::NoAgent,
            rows,
            attackers: all.map(|who| (who, who.attacker(lab, cast))).into(),
            early: [Who::Pod, Who::HostPod].map(|who| (who, who.attacker(lab, cast))).into(),
            arrivals: Arrivals::watch(lab).unwrap(),
            frozen: Instant::now(),
        }
    }

    /// Tries all rows; what applies only with an agent is `None` without one.
    pub(crate) fn play(&mut self, state: State) -> Vec<Option<Outcome>> {
        self.play_with(state, |_| {})
    }

    /// Plays them once more, and keeps of `cells` what is wrong.
    pub(crate) fn worst(
        &mut self,
        cells: Vec<Option<Outcome>>,
        state: State,
    ) -> Vec<Option<Outcome>> {
        let more = self.play(state);
        let both = self.rows.iter().zip(cells).zip(more);
        both.map(|((row, first), second)| {
            let wrong = |outcome: &Outcome| row.judge(outcome, state) == Verdict::Wrong;
            if first.as_ref().is_some_and(wrong) { first } else { second }
        })
        .collect()
    }

    /// The same while the agent hangs and its lease is good.
    pub(crate) fn play_hung(&mut self, agent: &Agent) -> Vec<Option<Outcome>> {
        self.play_with(State::Hung, |stage| {
            if stage.frozen.elapsed() > LEASE {
                agent.thaw().unwrap();
                stage.await_credentials();
                thread::sleep(RENEWED);
                stage.freeze(agent);
            }
        })
    }

    fn play_with(&mut self, state: State, before: impl Fn(&mut Self)) -> Vec<Option<Outcome>> {
        self.state = state;
        // On the way to these, connections were opened that must arrive; else nobody had any business there.
        if state == State::Running || state == State::Reinstalled {
            self.arrived();
        }
        self.assert_nothing_came();
        let outcomes = self.rows.iter().map(|row| {
            before(self);
            self.play_row(row)
        });
        outcomes.collect()
    }

    /// Asserts that nothing has come to the metadata service that no attempt is charged with.
    pub(crate) fn assert_nothing_came(&mut self) {
        let late = self.arrivals.take(self.lab).unwrap();
        assert!(late.is_empty(), "{late:?} came to IMDS before or after {:?}", self.state);
    }

    fn play_row(&mut self, row: &Row) -> Option<Outcome> {
        let attempt = match &row.act {
            Act::Attack(attack) => self.attempt(row.who, attack.clone(), self.timeout(row)),
            Act::Scene(_) if self.state == State::NoAgent => return None,
            Act::Scene(scene) => scene(self),
        };
        let broken = attempt.error.as_ref().filter(|error| !error.starts_with('E'));
        assert_eq!(broken, None, "the attempt itself is broken: {}", row.name);
        let packets = self.arrived();
        Some(Outcome { answer: Answer::of(&attempt, self.lab, row.who.role()), packets })
    }

    /// What has come of the attempt to the metadata service, with what trails behind: the answers' answers.
    fn arrived(&mut self) -> BTreeMap<IpAddr, u64> {
        let mut packets = self.arrivals.take(self.lab).unwrap();
        let mut more = packets.clone();
        for _ in 0..MOST_WAITS {
            if more.is_empty() {
                break;
            }
            thread::sleep(QUIET);
            more = self.arrivals.take(self.lab).unwrap();
            for (source, count) in &more {
                *packets.entry(*source).or_default() += count;
            }
        }
        packets
    }

    /// An attempt by the process that `who` has for this.
    pub(crate) fn attempt(&mut self, who: Who, attack: Attack, timeout_ms: u64) -> Attempt {
        self.attackers.get_mut(&who).unwrap().attempt(attack, timeout_ms).unwrap()
    }

    /// Two attempts at the same time.
    pub(crate) fn attempts(&mut self, first: (Who, Attack), second: (Who, Attack)) -> [Attempt; 2] {
        let mut first_attacker = self.attackers.remove(&first.0).unwrap();
        let timeout = self.patience();
        let attempts = thread::scope(|scope| {
            let trying = scope.spawn(|| first_attacker.attempt(first.1, timeout).unwrap());
            let second = self.attempt(second.0, second.1, timeout);
            [trying.join().unwrap(), second]
        });
        self.attackers.insert(first.0, first_attacker);
        attempts
    }

    /// Asks on one of the connections that are older than the agent's programs.
    pub(crate) fn ask_early(&mut self, who: Who) -> Attempt {
        self.early.get_mut(&who).unwrap().attempt(Attack::AskKept, IMPATIENT).unwrap()
    }

    /// Asks as an SDK does.
    pub(crate) fn ask(&self, pod: &LabPod) -> Attempt {
        pod.ask_once(&self.options()).unwrap()
    }

    pub(crate) fn options(&self) -> Options {
        Options { timeout_ms: self.patience(), ..Options::default() }
    }

    /// How long an answer may take now.
    pub(crate) fn patience(&self) -> u64 {
        if self.state.serves() { PATIENT } else { IMPATIENT }
    }

    fn timeout(&self, row: &Row) -> u64 {
        match row.expect {
            Expect::Served | Expect::Known => self.patience(),
            Expect::Node => PATIENT,
            _ => IMPATIENT,
        }
    }

    /// Opens connections to the metadata service, before the programs are attached.
    pub(crate) fn connect_early(&mut self) {
        let started = Instant::now();
        for (who, attacker) in &mut self.early {
            // Those of an earlier time that were not asked are gone with their process.
            *attacker = who.attacker(self.lab, self.cast);
            // The kernel detaches what was uninstalled a moment later.
            while attacker
                .attempt(Attack::Keep { way: Way::Connect, to: IMDS }, PATIENT)
                .unwrap()
                .error
                .is_some()
            {
                let limit = Duration::from_secs(5);
                assert!(
                    started.elapsed() < limit,
                    "no connection is let through, even after {limit:?}"
                );
            }
            for _ in 1..EARLY {
                attacker.must(Attack::Keep { way: Way::Connect, to: IMDS }).unwrap();
            }
        }
    }

    /// Waits until the pods are served.
    pub(crate) fn await_credentials(&mut self) {
        for who in [Who::Pod, Who::Thief] {
            let pod = self.cast.of(who);
            eventually("no credentials come", || {
                let attempt = pod.credentials().unwrap();
                attempt.status == Some(200)
                    && Answer::of(&attempt, self.lab, who.role()) == Answer::Own
            });
        }
    }

    pub(crate) fn freeze(&mut self, agent: &Agent) {
        agent.freeze().unwrap();
        self.frozen = Instant::now();
    }

    /// Waits until the kernel has noticed that the agent hangs.
    pub(crate) fn await_end_of_lease(&mut self) {
        let options = Options { timeout_ms: IMPATIENT, ..Options::default() };
        eventually("the kernel still redirects to an agent that hangs", || {
            self.cast.pod.ask_once(&options).unwrap().error.as_deref() == Some("EPERM")
        });
    }
}

//! The attacks.

use std::net::Ipv4Addr;

use lab::{
    AGENT_PORT, IMDS_V4, NODE_V4,
    pod_client::{
        hostile::{Asks, Program, Sends},
        victim::Pace,
    },
};

use crate::{Configuration, stage::Stage, storms::Storm};

/// What no honest pod sends: far less than any budget of a pod.
const USUAL: Pace = Pace { round_ms: 50, rounds_per_connection: 4, timeout_ms: 2000 };
/// Each round on a connection of its own, as forgers need one to begin.
const FRESH: Pace = Pace { round_ms: 40, rounds_per_connection: 1, timeout_ms: 2000 };
/// The ports that the victim of a guesser may use, and so has to guess among.
pub(crate) const GUESSED: (u16, u16) = (40_000, 40_999);
const LISTENER: (Ipv4Addr, u16) = (NODE_V4, AGENT_PORT);
/// Where the agent has its second listener for metrics, in the default configuration.
pub(crate) const METRICS: (Ipv4Addr, u16) = (NODE_V4, 9620);

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    /// A pod like any other.
    Pod,
    /// One whose addresses the API does not tell yet.
    Unpublished,
    /// One on the node's network.
    Host,
}

/// What becomes of the agent meanwhile, with the attack and in the control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Nothing,
    /// It is replaced.
    Takeover,
    /// It was stopped and started again: what is measured begins when it is ready.
    Restart,
}

/// What else is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// The connections in the kernel's map: no more than the attackers' quotas.
    Entries,
    /// Kernel memory of the agent's sockets in the attacker's network namespace.
    SocketMemory,
    /// A scrape of the metrics listener.
    Scrape,
    /// Events that the agent wrote.
    Events,
    /// The agent's processor time, which the attack must not raise by much.
    Cpu,
    /// The map of connections, which is full meanwhile: who is denied has failed, but nobody may be deceived.
    FullMap,
}

/// One attack.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) programs: Vec<(Who, Program)>,
    pub(crate) storm: Option<Storm>,
    pub(crate) event: Event,
    pub(crate) probe: Option<Probe>,
    pub(crate) pace: Pace,
}

// === impl Row ===

impl Row {
    /// Those that are played in the stage's configuration.
    pub(crate) fn of(stage: &Stage) -> Vec<Self> {
        match stage.configuration {
            Configuration::Default => default_configuration(stage),
            Configuration::NodePath => node_path(stage),
            Configuration::HostNetwork => host_network(stage),
        }
    }

    fn new(name: &'static str, programs: Vec<(Who, Program)>) -> Self {
        Self { name, programs, storm: None, event: Event::Nothing, probe: None, pace: USUAL }
    }

    fn one(name: &'static str, program: Program) -> Self {
        Self::new(name, vec![(Who::Pod, program)])
    }

    fn during(self, event: Event) -> Self {
        Self { event, ..self }
    }

    fn storm(self, storm: Storm) -> Self {
        Self { storm: Some(storm), ..self }
    }

    fn probe(self, probe: Probe) -> Self {
        Self { probe: Some(probe), ..self }
    }

    fn fresh(self) -> Self {
        Self { pace: FRESH, ..self }
    }
}

fn default_configuration(stage: &Stage) -> Vec<Row> {
    let hold = |sends| Program::Hold { to: (IMDS_V4, 80).into(), connections: 512, sends };
    let blind = Program::Hold { to: METRICS.into(), connections: 80, sends: Sends::Nothing };
    let pipeline = |connections, reads| Program::Pipeline { connections, burst: 400, reads };
    let flood = |asks| Program::Flood { threads: 16, asks };
    let cgroups = Program::Cgroups { below: stage.container(Who::Pod), count: 20_000 };
    let stir = Program::CgroupEvents { cgroup: stage.container(Who::Pod) };
    let many = || vec![(Who::Pod, pipeline(64, true)), (Who::Unpublished, hold(Sends::Requests))];
    vec![
        Row::one("pipelining, 16 connections", pipeline(16, true)),
        Row::one("pipelining, 512 connections", pipeline(512, true)),
        Row::one("pipelining, answers never read", pipeline(256, false)),
        Row::one("requests without end, never read", hold(Sends::Requests))
            .probe(Probe::SocketMemory),
        Row::one("slow heads", hold(Sends::SlowHead)),
        Row::one("held, idle connections", hold(Sends::Nothing)),
        Row::one("connection churn", Program::Churn { threads: 4, interface: None }),
        Row::one("token flood", flood(Asks::Tokens)),
        Row::one("reconnecting for each request", flood(Asks::Reconnecting)),
        Row::one("refused paths, log flood", flood(Asks::Refused)),
        Row::new("Event flood", vec![]).storm(Storm::Refusals).probe(Probe::Events),
        Row::new("annotation loop", vec![]).storm(Storm::Annotations),
        Row::new("objects of 1 MB", vec![]).storm(Storm::BigObjects),
        Row::one("idle connections to --metrics", blind).probe(Probe::Scrape),
        Row::one("sockets used twice", reuse()).probe(Probe::Entries),
        Row::new("several at once, takeover", many()).during(Event::Takeover),
        Row::new("several at once, restart", many()).during(Event::Restart),
        Row::one("events of its own cgroup", stir).probe(Probe::Cpu),
        Row::one("20,000 cgroups, takeover", cgroups.clone()).during(Event::Takeover),
        Row::one("20,000 cgroups, restart", cgroups).during(Event::Restart),
    ]
}

fn node_path(stage: &Stage) -> Vec<Row> {
    let spray = |window| Program::Spray {
        source: stage.victim.v4(),
        ports: GUESSED,
        listener: LISTENER,
        window,
    };
    let spray_all = || vec![(Who::Unpublished, spray(1000))];
    let churn = Program::Churn { threads: 4, interface: None };
    let pipeline = Program::Pipeline { connections: 512, burst: 400, reads: true };
    let storm = || Program::Namespaces { count: 3000, listener: LISTENER };
    let unpublished = |program| (Who::Unpublished, program);
    vec![
        Row::one("pipelining, 512 connections", pipeline),
        Row::one("connection churn", churn.clone()),
        Row::one("sockets used twice", reuse()).probe(Probe::Entries),
        Row::new("victim's ports guessed", vec![unpublished(spray(200))]).fresh(),
        Row::new("victim's ports guessed, takeover", spray_all()).fresh().during(Event::Takeover),
        Row::new("victim's ports guessed, map full", spray_all()).fresh().probe(Probe::FullMap),
        Row::new("3,000 network namespaces", vec![unpublished(storm()), unpublished(churn)]),
    ]
}

fn host_network(stage: &Stage) -> Vec<Row> {
    let defer = || {
        let interfaces = stage.interfaces();
        (Who::Host, Program::Defer { listener: LISTENER, ports: GUESSED, interfaces })
    };
    let forge = || (Who::Host, Program::Forge { listener: LISTENER, threads: 1 });
    let busy = (Who::Pod, Program::Pipeline { connections: 64, burst: 400, reads: true });
    let churn = (Who::Host, Program::Churn { threads: 4, interface: None });
    vec![
        Row::new("victim's connection forged", vec![forge()]).fresh(),
        Row::new("forged while the agent is busy", vec![forge(), busy]).fresh(),
        Row::new("forged, takeover", vec![forge()]).fresh().during(Event::Takeover),
        Row::new("forged, restart", vec![forge()]).fresh().during(Event::Restart),
        Row::new("victim's ends had before, twice", vec![defer()]).fresh(),
        Row::new("connection churn", vec![churn]),
    ]
}

fn reuse() -> Program {
    Program::Reuse { sockets: 4000, node_port: AGENT_PORT }
}

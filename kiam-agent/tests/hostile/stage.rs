//! The lab with its pods, and playing rows on it.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    thread,
    time::Duration,
};

use kiam_common::POD_QUOTA;
use lab::{Agent, Arrivals, Lab, LabPod, Neighbour, PodSpec, eventually, pod_client::victim::Pace};
use tokio::time::Instant;

use crate::{
    Configuration, agent,
    flows::{self, FullMap},
    judge::{Cost, Measurement, Outcome},
    rows::{Event, GUESSED, METRICS, Probe, Row, Who},
    storms::{RunningStorm, Storm},
};

/// How long the victim is measured alone and beside the attack; longer where the agent takes longer.
const CONTROL: Duration = Duration::from_millis(2000);
const ATTACK: Duration = Duration::from_millis(4000);
/// How long after an attack the victim may feel it.
const SETTLED: Duration = Duration::from_secs(10);
/// How long the agent may take to list big objects.
const LISTED: Duration = Duration::from_secs(60);
const SCRAPES: usize = 3;
const SCRAPE_LIMIT: Duration = Duration::from_secs(2);
/// Kernel memory of the agent's sockets that one pod may cause, in KiB.
const SOCKET_MEMORY: u64 = 16 << 10;
/// What [`Probe::Cpu`] allows of the agent's processor time for each of the attacker's, and in any case.
const CPU_RATIO: f64 = 0.2;
const CPU_FLOOR: Duration = Duration::from_millis(250);
/// Events in one row.
const EVENTS: usize = 100;
/// Connections of the victim and of the agent's own self-test, and those that are on their way.
const OTHER_ENTRIES: usize = 100;

pub(crate) struct Stage {
    pub(crate) configuration: Configuration,
    pub(crate) victim: LabPod,
    // Before the lab, which it needs.
    agent: Agent,
    pods: [(Who, LabPod); 3],
    /// What the kernel's counter of connects that were denied for want of a lease had when the measurement began.
    lapses: u64,
    /// How many lists the agent must have read before a measurement may end.
    lists_to_come: Option<u64>,
    arrivals: Arrivals,
    lab: Lab,
}

/// What is under way against the victim.
struct Attack {
    neighbours: Vec<Neighbour>,
    storm: Option<RunningStorm>,
    full: Option<FullMap>,
}

// === impl Stage ===

impl Stage {
    const VICTIMS_ROLE: &str = "orders";

    pub(crate) fn set(configuration: Configuration) -> Self {
        let lab = Lab::start().unwrap();
        let agent = lab.agent(configuration.flags());
        let victim = PodSpec::new("shop", "victim").role(Self::VICTIMS_ROLE);
        let victim = match configuration {
            Configuration::HostNetwork => victim.host_network(),
            _ => victim,
        };
        let victim = lab.pod(victim).unwrap();
        let spec = |name: &str| PodSpec::new("mob", name).role(name);
        let pods = [
            (Who::Pod, lab.pod(spec("neighbour")).unwrap()),
            (Who::Unpublished, lab.unpublished_pod(spec("unpublished")).unwrap()),
            (Who::Host, lab.pod(spec("host").host_network()).unwrap()),
        ];
        if configuration != Configuration::Default {
            let range = format!("{} {}", GUESSED.0, GUESSED.1);
            victim.netns().sysctl("ipv4/ip_local_port_range", &range).unwrap();
            // There are not enough for each to wait for a minute after its last connection.
            victim.netns().sysctl("ipv4/tcp_tw_reuse", "1").unwrap();
        }
        let arrivals = Arrivals::watch(&lab).unwrap();
        let mut stage = Self {
            configuration,
            victim,
            agent,
            pods,
            lapses: 0,
            lists_to_come: None,
            arrivals,
            lab,
        };
        assert_eq!(stage.settle(), None);
        stage
    }

    /// The cgroup of a pod's container.
    pub(crate) fn container(&self, who: Who) -> PathBuf {
        self.pod(who).cgroup().path().to_owned()
    }

    /// The node's ends of two pods' links.
    pub(crate) fn interfaces(&self) -> [String; 2] {
        [Who::Pod, Who::Unpublished].map(|who| self.pod(who).link().unwrap().to_owned())
    }

    fn pod(&self, who: Who) -> &LabPod {
        self.pods.iter().find(|(is, _)| *is == who).map(|(_, pod)| pod).unwrap()
    }

    /// Plays one row: the control, the attack, and the end of it.
    pub(crate) fn play(&mut self, row: &Row) -> Outcome {
        let mut outcome = Outcome::default();
        let before = agent::cpu(&self.lab);
        let started = Instant::now();
        outcome.control = self.measure(row, CONTROL);
        let usual = (agent::cpu(&self.lab) - before).div_f64(started.elapsed().as_secs_f64());

        let packets = self.packets();
        self.arrivals.take(&self.lab).unwrap();
        let log = self.log_size();
        agent::forget_peak(&self.agent);
        let attackers: BTreeSet<Who> = row.programs.iter().map(|(who, _)| *who).collect();
        let pods_cpu = |stage: &Self| -> Duration {
            attackers.iter().map(|who| agent::pods_cpu(stage.pod(*who))).sum()
        };
        let (begun, agent_cpu, attacker_cpu) =
            (Instant::now(), agent::cpu(&self.lab), pods_cpu(self));

        let lists = (row.storm == Some(Storm::BigObjects)).then(|| agent::lists(&self.agent) + 1);
        let attack = self.attack(row);
        self.lists_to_come = lists;
        outcome.may_fail = row.probe == Some(Probe::FullMap);
        outcome.attacked = self.measure(row, ATTACK);
        self.lists_to_come = None;
        let (probes, notes) = self.probe(row, &attack);
        outcome.probes.extend(probes);
        outcome.notes.extend(notes);
        let peak = agent::peak(&self.agent);
        let agent_cpu = agent::cpu(&self.lab) - agent_cpu;
        let usual_cpu = usual.mul_f64(begun.elapsed().as_secs_f64());
        outcome.notes.extend(attack.end());
        let attacker_cpu = pods_cpu(self) - attacker_cpu;
        let caused = agent_cpu.saturating_sub(usual_cpu);
        if row.probe == Some(Probe::Cpu) && caused > CPU_FLOOR + attacker_cpu.mul_f64(CPU_RATIO) {
            let fault =
                format!("{caused:.1?} of the agent's CPU, {attacker_cpu:.1?} of the attacker's");
            outcome.probes.push(fault);
        }
        outcome.cost = Cost {
            agent_cpu,
            usual_cpu,
            attacker_cpu,
            memory: peak,
            log: self.log_size().saturating_sub(log) >> 10,
            lapses: agent::lapses(&self.agent).saturating_sub(self.lapses),
            packets: self.packets() - packets
                + self.arrivals.take(&self.lab).unwrap().values().sum::<u64>(),
        };
        outcome.probes.extend(self.settle());
        outcome
    }

    fn attack(&self, row: &Row) -> Attack {
        let neighbours =
            row.programs.iter().map(|(who, program)| self.pod(*who).hostile(program).unwrap());
        let neighbours = neighbours.collect();
        let storm = row.storm.map(|storm| storm.start(&self.lab));
        let full = (row.probe == Some(Probe::FullMap)).then(|| FullMap::fill(&self.lab));
        Attack { neighbours, storm, full }
    }

    /// Has the victim ask for `least` at least, and while the row's event happens.
    fn measure(&mut self, row: &Row, least: Duration) -> Measurement {
        let mut replaced = (row.event == Event::Restart).then(|| self.restart());
        // Without an agent there is no lease, and nobody is served.
        self.lapses = agent::lapses(&self.agent);
        let (started, victim) = (Instant::now(), self.victim.victim(&row.pace).unwrap());
        if row.event == Event::Takeover {
            thread::sleep(least / 4);
            replaced = Some(self.take_over());
        }
        thread::sleep(least.saturating_sub(started.elapsed()));
        while self.lists_to_come.is_some_and(|lists| agent::lists(&self.agent) < lists) {
            assert!(started.elapsed() < LISTED, "the agent does not list what there is");
            thread::sleep(Duration::from_millis(100));
        }
        let served = victim.finish().unwrap();
        Measurement { replaced, ..Measurement::of(&served, &self.lab, Self::VICTIMS_ROLE) }
    }

    fn take_over(&mut self) -> Duration {
        let started = Instant::now();
        let next = self.lab.agent(self.configuration.flags());
        let took = started.elapsed();
        assert!(self.agent.terminate().unwrap().success());
        self.agent = next;
        took
    }

    fn restart(&mut self) -> Duration {
        assert!(self.agent.terminate().unwrap().success());
        let started = Instant::now();
        self.agent = self.lab.agent(self.configuration.flags());
        started.elapsed()
    }

    /// What the row's probe saw: what is wrong, and what is worth a note.
    fn probe(&self, row: &Row, attack: &Attack) -> (Vec<String>, Vec<String>) {
        let (mut wrong, mut notes) = (Vec::new(), Vec::new());
        let mut most = |what: &str, count: usize, most: usize| {
            notes.push(format!("{count} {what}"));
            if count > most {
                wrong.push(format!("{count} {what}, of {most} at most"));
            }
        };
        match row.probe {
            Some(Probe::Entries) => {
                let quota = usize::try_from(POD_QUOTA).unwrap() * 2;
                most("entries", flows::count(&self.lab), quota + OTHER_ENTRIES);
            }
            Some(Probe::SocketMemory) => {
                let kib = usize::try_from(self.socket_memory()).unwrap();
                most("KiB in the agent's sockets", kib, usize::try_from(SOCKET_MEMORY).unwrap());
            }
            Some(Probe::Scrape) => {
                let failed = (0..SCRAPES).filter(|_| !self.scrape()).count();
                most("failed scrapes", failed, 0);
            }
            Some(Probe::Events) => {
                let events = self.lab.kubernetes.events();
                let events = events.iter();
                let events = events.filter(|event| event["regarding"]["namespace"] == "storm");
                most("Events", events.count(), EVENTS);
            }
            Some(Probe::FullMap) => {
                let filled = attack.full.as_ref().map_or(0, FullMap::entries);
                notes.push(format!("{filled} entries of nobody"));
            }
            Some(Probe::Cpu) | None => {}
        }
        (wrong, notes)
    }

    /// What the sockets of the agent hold in the network namespace where the neighbour's connections end.
    fn socket_memory(&self) -> u64 {
        let netns = match self.configuration {
            Configuration::Default => self.pod(Who::Pod).netns(),
            _ => self.lab.node.netns(),
        };
        let output = netns.command("ss").args(["-tmnpHO", "state", "connected"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let agents = text.lines().filter(|line| line.contains("kiam-agent"));
        agents.map(memory_of).sum::<u64>() >> 10
    }

    fn scrape(&self) -> bool {
        let scrape = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from(METRICS), SCRAPE_LIMIT)?;
            stream.set_read_timeout(Some(SCRAPE_LIMIT))?;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let text = self.lab.node.netns().enter(scrape).unwrap();
        text.is_ok_and(|text| text.contains("kiam_imds_requests_total"))
    }

    /// Packets of pods at the metadata service; the node's are told by their type of service.
    fn packets(&self) -> u64 {
        let packets = self.lab.imds.packets();
        let pods = self.pods.iter().map(|(_, pod)| pod).chain([&self.victim]);
        let own = pods.filter(|pod| pod.link().is_some());
        own.flat_map(LabPod::ips).filter_map(|address| packets.get(&address)).sum()
    }

    fn log_size(&self) -> u64 {
        let logs = fs::read_dir(self.lab.node.folder()).unwrap().map(Result::unwrap);
        let logs = logs.filter(|entry| entry.file_name().to_string_lossy().starts_with("agent"));
        logs.map(|entry| entry.metadata().unwrap().len()).sum()
    }

    /// Waits until the victim is served as before; after a limit, an agent that is started again serves it.
    fn settle(&mut self) -> Option<String> {
        let started = Instant::now();
        while !self.is_settled() {
            if started.elapsed() > SETTLED {
                self.agent.kill().unwrap();
                self.agent = self.lab.agent(self.configuration.flags());
                eventually("the victim is served", || self.is_settled());
                return Some(format!("not served again {SETTLED:?} after the attack"));
            }
        }
        None
    }

    fn is_settled(&self) -> bool {
        let pace = Pace { round_ms: 50, rounds_per_connection: 1, timeout_ms: 2000 };
        let victim = self.victim.victim(&pace).unwrap();
        thread::sleep(Duration::from_millis(200));
        let served = Measurement::of(&victim.finish().unwrap(), &self.lab, Self::VICTIMS_ROLE);
        served.failed() == 0 && served.wrong.is_empty() && served.rounds > 0
    }
}

// === impl Attack ===

impl Attack {
    /// Ends everything; what the attackers did.
    fn end(self) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(storm) = self.storm {
            notes.push(format!("{} changes", storm.changes()));
        }
        for neighbour in self.neighbours {
            let report = neighbour.finish().unwrap();
            notes.extend(report.0.iter().map(|(what, count)| format!("{count} {what}")));
        }
        notes
    }
}

/// Bytes that a socket holds, by a line of `ss`: `… skmem:(r131072,rb131072,t0,tb46080,f0,w0,o0,bl0,d0) …`.
fn memory_of(line: &str) -> u64 {
    let fields = line.split_once("skmem:(").and_then(|(_, rest)| rest.split_once(')'));
    let fields = fields.map(|(fields, _)| fields).unwrap_or_default().split(',');
    let of = |field: &str| {
        let digits = field.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let counts = matches!(&field[..field.len() - digits.len()], "r" | "f" | "w" | "bl");
        counts.then(|| digits.parse::<u64>().ok()).flatten()
    };
    fields.filter_map(of).sum()
}

#[test]
fn a_sockets_memory_is_what_it_holds_and_not_what_it_may_hold() {
    let line =
        "ESTAB 0 0 127.0.0.1:1 127.0.0.1:2 skmem:(r512,rb131072,t0,tb46080,f256,w128,o0,bl64,d0)";
    assert_eq!(memory_of(line), 512 + 256 + 128 + 64);
    assert_eq!(memory_of("ESTAB 0 0 127.0.0.1:1 127.0.0.1:2"), 0);
}

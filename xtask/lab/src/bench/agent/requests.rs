//! Requests, beside a server that does nothing but answer.

use std::{net::IpAddr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    Agent, Lab, LabPod, NODE_V4, PodSpec, Process,
    fake::kubernetes::PodRecord,
    loopback::{self, LoopbackNode},
};
use tokio::time::Instant;

use super::{
    super::statistics::order,
    Figure, Plan,
    load::{Loaded, Request, load, script},
};
use xtask::command::{command, say};

const ROLE: &str = "bench";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/bench";
/// No limit of one pod's share is measured.
const RATE: &str = "--pod-rate=1000000:1000000";
/// What a node logs.
const LEVEL: &str = "--level=info";
const LIMIT: Duration = Duration::from_secs(60);

/// A kind of request.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: &'static str,
    path: &'static str,
    token: bool,
    keeps: bool,
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "credentials, kept connection, IMDSv1",
        path: CREDENTIALS,
        token: false,
        keeps: true,
    },
    Kind {
        name: "credentials, kept connection, IMDSv2",
        path: CREDENTIALS,
        token: true,
        keeps: true,
    },
    Kind { name: "list, kept connection, IMDSv1", path: LIST, token: false, keeps: true },
    Kind { name: "list, kept connection, IMDSv2", path: LIST, token: true, keeps: true },
    Kind { name: "credentials, new connections", path: CREDENTIALS, token: false, keeps: false },
];

/// What both servers did, round by round.
#[derive(Debug, Default)]
struct Pair {
    agent: Vec<Loaded>,
    bare: Vec<Loaded>,
}

/// From the node's own loopback, where the agent knows the pod by its address.
pub(super) fn on_node(plan: &Plan) -> Result<Vec<Figure>> {
    let pod = loopback::pod(1).role(ROLE).running(&[IpAddr::from([127, 0, 0, 1])]);
    let node = node(plan, &pod)?;
    let (address, token) = (node.agent.pods(), token(&node, &pod)?);
    let credentials = node.credentials(&pod).body;
    let folder = tempfile::tempdir().context("making a folder")?;
    let (script, log) = (script(folder.path())?, folder.path().join("bare"));
    let (bare, bare_address) = bare(plan, command(&plan.bare), "127.0.0.1:0", &credentials, log)?;
    let mut pairs: Vec<Pair> = KINDS.iter().map(|_| Pair::default()).collect();
    let time = Duration::from_secs(plan.seconds);
    for round in 0..=plan.rounds {
        say(format!("round {round} of {} (the first is not counted)", plan.rounds));
        for index in order(KINDS.len(), round) {
            let kind = KINDS[index];
            let to_agent = kind.request(&format!("http://{address}"), &token);
            let to_bare = kind.request(&format!("http://{bare_address}"), &token);
            let mut both = [None, None];
            for server in order(2, round) {
                let (request, process): (_, &Process) =
                    if server == 0 { (&to_agent, &node.agent) } else { (&to_bare, &bare) };
                let time = if round == 0 { Duration::from_secs(1) } else { time };
                both[server] = Some(load(command("wrk"), &script, request, time, process)?);
            }
            if let ([Some(agent), Some(bare)], true) = (both, round > 0) {
                pairs[index].agent.push(agent);
                pairs[index].bare.push(bare);
            }
        }
    }
    let mut figures: Vec<Figure> = KINDS
        .iter()
        .zip(&pairs)
        .flat_map(|(kind, pair)| pair.figures("requests", kind.name))
        .collect();
    let rates = |pair: &Pair| -> Vec<f64> { pair.agent.iter().map(|it| it.per_second).collect() };
    let (v1, v2) = (rates(&pairs[0]), rates(&pairs[1]));
    let same = Figure::of("requests", "credentials, IMDSv2 beside IMDSv1", "req/s", &v2);
    figures.extend(same.map(|figure| figure.beside(&v2, &v1)));
    Ok(figures)
}

/// From inside a pod, by both paths.
pub(super) fn in_pods(plan: &Plan) -> Result<Vec<Figure>> {
    let mut stages = Vec::new();
    for (name, path) in [("pod-local", "--path=pod-local"), ("node path", "--path=node")] {
        stages.push((name, Stage::start(plan, path).context(name)?, Pair::default()));
    }
    let time = Duration::from_secs(plan.seconds);
    for round in 0..=plan.rounds {
        for index in order(stages.len(), round) {
            let (_, stage, pair) = &mut stages[index];
            let wrk = || stage.pod.command("wrk");
            let (agent, bare) = (
                load(wrk()?, &stage.script, &stage.to_agent, time, &stage.agent)?,
                load(wrk()?, &stage.script, &stage.to_bare, time, &stage.bare)?,
            );
            if round > 0 {
                pair.agent.push(agent);
                pair.bare.push(bare);
            }
        }
    }
    let named = stages.iter().flat_map(|(name, _, pair)| {
        pair.figures("pods", &format!("credentials, kept connection, from a pod, {name}"))
    });
    Ok(named.collect())
}

/// An agent on loopback that knows `pod` and has its credentials.
fn node(plan: &Plan, pod: &PodRecord) -> Result<LoopbackNode> {
    let folder_flags = [RATE, LEVEL];
    let node = LoopbackNode::start_by(&plan.agent, &folder_flags, |kubernetes, _| {
        loopback::schedule(kubernetes, pod);
    })?;
    let started = Instant::now();
    while !node.serves(pod) {
        ensure!(started.elapsed() < LIMIT, "the pod gets no credentials: {}", node.agent.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(node)
}

/// A session token, as the pod's SDK gets it.
fn token(node: &LoopbackNode, _: &PodRecord) -> Result<String> {
    let request =
        b"PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\
        X-aws-ec2-metadata-token-ttl-seconds: 21600\r\n\r\n";
    let answer = loopback::ask(node.agent.pods(), request)?;
    let (_, token) = answer.split_once("\r\n\r\n").context("a token is the body of an answer")?;
    Ok(token.trim().to_owned())
}

/// The bare server with this body, by a command that runs it.
fn bare(
    plan: &Plan,
    mut command: Command,
    address: &str,
    credentials: &str,
    log: PathBuf,
) -> Result<(Process, String)> {
    ensure!(plan.bare.exists(), "{} was not built", plan.bare.display());
    command.args([address, ROLE, credentials]);
    let mut bare = Process::start("the bare server", &mut command, log)?;
    let said =
        |log: &str| log.lines().find_map(|it| it.strip_prefix("listening on ").map(str::to_owned));
    bare.wait("listened", LIMIT, |process| said(&process.log()).is_some())?;
    let address = said(&bare.log()).context("the bare server listened before")?;
    Ok((bare, address))
}

// === impl Kind ===

impl Kind {
    fn request(self, server: &str, token: &str) -> Request {
        let mut headers = vec!["Host: 169.254.169.254".to_owned()];
        if self.token {
            headers.push(format!("X-aws-ec2-metadata-token: {token}"));
        }
        if !self.keeps {
            headers.push("Connection: close".to_owned());
        }
        Request { url: format!("{server}{}", self.path), headers }
    }
}

// === impl Pair ===

impl Pair {
    fn figures(&self, group: &'static str, name: &str) -> Vec<Figure> {
        type Value = fn(&Loaded) -> f64;
        let units: [(&str, Value); 3] = [
            ("req/s", |it| it.per_second),
            ("CPU µs", |it| it.cpu_micros),
            ("p99 ms", |it| it.p99_millis),
        ];
        let figures = units.into_iter().filter_map(|(unit, value)| {
            let agent: Vec<f64> = self.agent.iter().map(value).collect();
            let bare: Vec<f64> = self.bare.iter().map(value).collect();
            Figure::of(group, name, unit, &agent).map(|figure| figure.beside(&agent, &bare))
        });
        figures.collect()
    }
}

/// A node with a pod and the two servers that it asks.
struct Stage {
    to_agent: Request,
    to_bare: Request,
    script: PathBuf,
    // In the order in which they go.
    agent: Agent,
    bare: Process,
    pod: LabPod,
    _lab: Lab,
}

// === impl Stage ===

impl Stage {
    fn start(plan: &Plan, path: &str) -> Result<Self> {
        let lab = Lab::start()?;
        let pod = lab.pod(PodSpec::new("shop", "client").role(ROLE))?;
        let mut agent = Agent::start(&lab, &plan.agent, &[path, RATE, LEVEL])?;
        agent.wait_ready(LIMIT)?;
        let started = Instant::now();
        let credentials = loop {
            let attempt = pod.credentials()?;
            if attempt.status == Some(200) {
                break attempt.body;
            }
            ensure!(started.elapsed() < LIMIT, "no credentials: {attempt:?}\n{}", agent.log());
            std::thread::sleep(Duration::from_millis(20));
        };
        let folder = lab.node.folder().to_owned();
        let script = script(&folder)?;
        let command = lab.node.command(&plan.bare)?;
        let at = format!("{NODE_V4}:0");
        let (bare, address) = bare(plan, command, &at, &credentials, folder.join("bare"))?;
        let keeps = KINDS[0];
        Ok(Self {
            to_agent: keeps.request("http://169.254.169.254", ""),
            to_bare: keeps.request(&format!("http://{address}"), ""),
            script,
            agent,
            bare,
            pod,
            _lab: lab,
        })
    }
}

//! `cargo xtask bench restart`: how soon an agent serves after its predecessor was killed, or beside it.

use std::{
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use lab::{Agent, Lab, LabPod, PodSpec, fake::Injected, pod_client::Tally};
use tokio::time::Instant;

use super::{
    Subject,
    machine::{self, Machine},
    statistics::Range,
    write,
};
use xtask::command::{say, workspace};

/// Nothing takes so long but a mistake.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two attempts of the pod that waits for the agent.
const POLL: Duration = Duration::from_millis(1);
/// Between two requests of the pods that ask across a takeover.
const PACE_MS: u64 = 50;

/// How much to measure, and where to write it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds, each with a kill and a takeover; one more before them is not counted, so that the page cache is warm.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Pods on the node, each with a role of its own.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=200))]
    pods: u32,
    /// How long STS takes to answer, in milliseconds.
    #[arg(long, default_value_t = 50)]
    sts_ms: u64,
    /// An agent that is built already; absent: this one, built as it is released.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// The document to write, relative to the workspace.
    #[arg(long, default_value = "docs/restarts.md")]
    out: PathBuf,
}

/// What was measured, in milliseconds, by round.
#[derive(Debug, Default)]
pub(super) struct Measured {
    /// After `kill -9`: from the next agent's start to its first answer, and to its readiness.
    pub(super) killed_answer: Vec<f64>,
    pub(super) killed_ready: Vec<f64>,
    /// Beside an agent that serves: from the start to the listeners' takeover, and to readiness.
    pub(super) beside_listens: Vec<f64>,
    pub(super) beside_ready: Vec<f64>,
    /// Requests across all takeovers, and those that failed.
    asked: u64,
    failed: u64,
}

/// Measures, and writes the document.
pub(super) fn run(options: &Options) -> Result<()> {
    let subject = Subject::prepare(options.agent.as_deref())?;
    let measured = measure(&subject.binary, options.rounds, options.pods, options.sts_ms)?;
    let text = render(options, &measured, &subject);
    write(&workspace().join(&options.out), &text)
}

/// Kills and replaces the agent `binary` in each of `rounds`, on a node with that many pods.
pub(super) fn measure(binary: &Path, rounds: u32, count: u32, sts_ms: u64) -> Result<Measured> {
    let lab = Lab::start()?;
    let slow = lab.sts.faults().inject(Injected::slow(Duration::from_millis(sts_ms)));
    let pods = pods(&lab, count)?;
    let mut agent = Agent::start(&lab, binary, &[])?;
    agent.wait_ready(LIMIT)?;
    let mut measured = Measured::default();
    for round in 0..=rounds {
        say(format!("round {round} of {rounds} (the first is not counted)"));
        let mut this = Measured::default();
        agent = this.kill(&lab, binary, agent, &pods[0])?;
        agent = this.take_over(&lab, binary, agent, &pods)?;
        if round > 0 {
            measured.add(this);
        }
    }
    slow.lift();
    let packets: u64 =
        pods.iter().flat_map(LabPod::ips).map(|address| lab.imds.packets_from(address)).sum();
    ensure!(packets == 0, "{packets} packets of pods reached the metadata service");
    Ok(measured)
}

fn pods(lab: &Lab, count: u32) -> Result<Vec<LabPod>> {
    let spec =
        |number| PodSpec::new("shop", &format!("pod-{number}")).role(&format!("role-{number}"));
    (0..count).map(|number| lab.pod(spec(number))).collect()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

// === impl Measured ===

impl Measured {
    /// Kills `agent`, starts another one, and waits until `pod` is answered.
    fn kill(&mut self, lab: &Lab, binary: &Path, mut agent: Agent, pod: &LabPod) -> Result<Agent> {
        agent.kill()?;
        let started = Instant::now();
        let mut next = Agent::start(lab, binary, &[])?;
        loop {
            let attempt = pod.credentials()?;
            if attempt.status == Some(200) {
                break;
            }
            if started.elapsed() > LIMIT {
                bail!("the pod gets no credentials: {attempt:?}; the agent said:\n{}", next.log());
            }
            thread::sleep(POLL);
        }
        self.killed_answer.push(millis(started.elapsed()));
        next.wait_ready(LIMIT)?;
        self.killed_ready.push(millis(started.elapsed()));
        Ok(next)
    }

    /// Starts an agent beside `agent`, which ends then, while three pods ask.
    fn take_over(
        &mut self,
        lab: &Lab,
        binary: &Path,
        mut agent: Agent,
        pods: &[LabPod],
    ) -> Result<Agent> {
        let paced = lab::pod_client::Options { pause_ms: PACE_MS, ..Default::default() };
        let asking: Vec<_> =
            pods.iter().take(3).map(|pod| pod.ask_from(1, &paced)).collect::<Result<_>>()?;
        let started = Instant::now();
        let mut next = Agent::start(lab, binary, &[])?;
        next.wait_said("Listening pods=", LIMIT)?;
        self.beside_listens.push(millis(started.elapsed()));
        next.wait_ready(LIMIT)?;
        self.beside_ready.push(millis(started.elapsed()));
        agent.terminate()?;
        for asking in asking {
            let tally: Tally = asking.finish()?;
            self.asked += tally.attempts();
            self.failed += tally.failures.values().sum::<u64>();
        }
        Ok(next)
    }

    fn add(&mut self, round: Self) {
        self.killed_answer.extend(round.killed_answer);
        self.killed_ready.extend(round.killed_ready);
        self.beside_listens.extend(round.beside_listens);
        self.beside_ready.extend(round.beside_ready);
        self.asked += round.asked;
        self.failed += round.failed;
    }
}

/// The document's text.
fn render(options: &Options, measured: &Measured, subject: &Subject) -> String {
    let Subject { version, load_before, .. } = subject;
    let machine = Machine::look();
    let below = if machine.is_virtual { ", virtual" } else { "" };
    let rows = [
        ("`kill -9`, then a new agent", "first answer to a pod", &measured.killed_answer),
        ("", "`/ready`", &measured.killed_ready),
        ("beside an agent that serves", "takes over its listeners", &measured.beside_listens),
        ("", "`/ready`", &measured.beside_ready),
    ];
    let mut text = format!(
        "# Restarts\n\n\
         For operators and reviewers: how soon a new agent serves. Written by\n\n\
         ```sh\ncargo xtask bench restart --rounds={} --pods={} --sts-ms={}\n```\n\n\
         as root. Do not edit this page; run the command again.\n\n\
         | | |\n| --- | --- |\n| day | {} |\n| agent | {version} |\n| processor | {}, {} threads{below} |\n\
         | kernel | {} |\n| load average before, after (1, 5, 15 minutes) | {load_before}; {} |\n\
         | node | {} pods, each with a role of its own; STS takes {} ms |\n| rounds | {} |\n\n\
         Milliseconds from the start of the new agent's process, in rounds of one kill and one takeover.\n\n\
         | start | until | median | fastest | slowest |\n| --- | --- | --: | --: | --: |\n",
        options.rounds,
        options.pods,
        options.sts_ms,
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        machine.processor,
        machine.cores,
        machine.kernel,
        machine::load(),
        options.pods,
        options.sts_ms,
        options.rounds,
    );
    for (start, until, times) in rows {
        if let Some(range) = Range::of(times.iter().copied()) {
            let Range { median, min, max } = range;
            text.push_str(&format!("| {start} | {until} | {median:.0} | {min:.0} | {max:.0} |\n"));
        }
    }
    text.push_str(&format!(
        "\nAcross the takeovers three pods sent {} requests, each on a new connection and {PACE_MS} ms after the last\n\
         answer: {} failed.\n",
        measured.asked, measured.failed
    ));
    text.push_str(METHOD);
    text
}

const METHOD: &str = "
## Method

The node is made of network namespaces, with stand-ins for Kubernetes, STS and the metadata service.
The agent is the release build. A round that is not counted comes first, so that the program is in
the page cache.

After `kill -9` the kernel denies pods until the next agent serves. A process in a pod asks for
credentials, and is started again until it has them. Each attempt takes some milliseconds, which are
part of the first answer's time. The new agent starts without credentials, so the first answer waits
for the list of the pods and for one call to STS.

In a takeover the earlier agent answers until the new one has its listeners. It gets SIGTERM once
the new one is ready.
";

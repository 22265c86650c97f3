//! `cargo xtask bench path`: a lab with an agent for every way and number of rules, all there at once, so that each round
//! asks by all of them.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::pod_client::{
    Imds,
    bench::{Measured, WARM_UP},
};
use lab::{Agent, Lab, LabPod, PodSpec};
use tokio::time::Instant;

use super::document::{self, Report, Series};
use super::machine::{self, Machine};
use super::rules::{self, Tools};
use super::statistics::order;
use super::way::Way;
use super::{release_agent, require_node, write};
use xtask::command::{command, output_of, printed, say, workspace};
use xtask::page;
use xtask::toolchain;

const ROLE: &str = "bench";
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long the agent may take to learn of its pod.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// What an agent answers one pod.
const REQUESTS_PER_SECOND: u32 = 200;
const POLL: Duration = Duration::from_millis(50);

/// How much to measure, and where to write it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds, each with every way at every number of rules; one more before them is not counted.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) rounds: u32,
    /// Timed requests of each kind (a connection each, one connection for all) by each way in each round.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) requests: u32,
    /// Numbers of services that kube-proxy has rules for, comma separated. A single one costs nothing, but switches
    /// connection tracking on.
    #[arg(long, value_delimiter = ',', default_value = "0,1,10000,50000",
        value_parser = clap::value_parser!(u32).range(..=200_000))]
    pub(super) rules: Vec<u32>,
    /// The processor that the pods' client runs on. With that of the agent the same, what a request takes is steadier: no
    /// other processor has to be woken.
    #[arg(long, default_value_t = 0)]
    pub(super) client_processor: u32,
    /// The processor that the agents run on.
    #[arg(long, default_value_t = 0)]
    pub(super) agent_processor: u32,
    /// An agent that is built already; absent: this one, built as it is released.
    #[arg(long)]
    pub(super) agent: Option<PathBuf>,
    /// A file for the text, relative to the workspace; absent: its part of `docs/benchmarks.md`, with the picture.
    #[arg(long)]
    pub(super) out: Option<PathBuf>,
}

/// A way at a number of rules: a lab of its own, and what was measured in each round.
#[derive(Debug)]
struct Course {
    way: Way,
    rules: u32,
    rounds: Vec<Measured>,
    /// When it was last measured.
    last: Option<Instant>,
    // In the order in which they go.
    agent: Agent,
    pod: LabPod,
    lab: Lab,
}

/// The programs that are measured.
#[derive(Debug)]
struct Programs {
    agent: PathBuf,
    agent_processor: u32,
    client: PathBuf,
    client_processor: u32,
    has_path: bool,
    version: String,
}

/// Measures, and writes the document.
pub(super) fn run(options: &Options) -> Result<()> {
    require_node()?;
    // Without them the other ways can still be measured, and the document says what was left out.
    toolchain::ensure_packet_filters();
    let programs = Programs::find(options)?;
    let tools = Tools::look();
    let (load_before, started) = (machine::load(), Instant::now());
    let (mut courses, left_out) = set_up(options, &programs, &tools)?;
    for round in 0..=options.rounds {
        say(format!("round {round} of {} (the first is not counted)", options.rounds));
        for index in order(courses.len(), round) {
            let course = &mut courses[index];
            course.wait_for_share(options.requests);
            let measured = course.measure(&programs, options.requests)?;
            if round > 0 {
                course.rounds.push(measured);
            }
        }
    }
    for course in &courses {
        course.check_nothing_got_past()?;
    }
    let report = Report {
        machine: Machine::look(),
        tools,
        load_before,
        load_after: machine::load(),
        took: started.elapsed(),
        day: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        agent: programs.version,
        requests: options.requests,
        processors: (options.client_processor, options.agent_processor),
        command: repeat(options),
        series: courses.iter().map(Course::series).collect(),
        left_out,
    };
    let text = document::render(&report);
    if let Some(out) = &options.out {
        return write(&workspace().join(out), &text);
    }
    page::write("docs/benchmarks.md", "cargo xtask bench path", &text)?;
    write(&workspace().join("docs/images/paths.svg"), &document::picture(&report))
}

/// Starts a lab for every way at every number of rules; the second list says which can't be, and why.
fn set_up(
    options: &Options,
    programs: &Programs,
    tools: &Tools,
) -> Result<(Vec<Course>, Vec<String>)> {
    let (mut courses, mut left_out) = (Vec::new(), Vec::new());
    for &rules in &options.rules {
        for way in Way::ALL {
            let name = format!("{} at {rules} rules", way.name());
            let lack = programs.lack(way).or_else(|| tools.lack(way, rules));
            if let Some(reason) = lack {
                say(format!("left out: {name}: {reason}"));
                left_out.push(format!("{name}: {reason}"));
                continue;
            }
            say(format!("setting up {name}"));
            courses.push(Course::start(way, rules, programs).context(name)?);
        }
    }
    ensure!(!courses.is_empty(), "every way was left out");
    Ok((courses, left_out))
}

fn repeat(options: &Options) -> String {
    let rules: Vec<String> = options.rules.iter().map(u32::to_string).collect();
    format!(
        "cargo xtask bench path --rounds={} --requests={} --rules={} --client-processor={} --agent-processor={}",
        options.rounds,
        options.requests,
        rules.join(","),
        options.client_processor,
        options.agent_processor
    )
}

// === impl Programs ===

impl Programs {
    /// Finds them. The client is this binary; all that it does while the clock runs is system calls.
    fn find(options: &Options) -> Result<Self> {
        let agent = release_agent(options.agent.as_deref())?;
        let ask = |flag: &str| {
            let output = output_of(command(&agent).arg(flag));
            output.with_context(|| format!("{} {flag} says nothing", agent.display()))
        };
        let (help, version) = (ask("--help")?, ask("--version")?);
        Ok(Self {
            agent,
            agent_processor: options.agent_processor,
            client: lab::client_binary()?,
            client_processor: options.client_processor,
            has_path: has_path(&help),
            version,
        })
    }

    /// Why these can't take `way`; `None`: they can.
    fn lack(&self, way: Way) -> Option<&'static str> {
        (way == Way::PodLocal && !self.has_path).then_some("this agent has no `--path`")
    }
}

fn has_path(help: &str) -> bool {
    help.split_whitespace().any(|word| word == "--path" || word.starts_with("--path="))
}

// === impl Course ===

impl Course {
    /// Starts all of it, up to the first answer that the pod gets.
    fn start(way: Way, rules: u32, programs: &Programs) -> Result<Self> {
        let lab = Lab::start()?;
        rules::load(&lab.node, way, rules)?;
        let pod = lab.pod(PodSpec::new("shop", "client").role(ROLE))?;
        let mut pinned = lab.node.command("taskset")?;
        pinned.args(["--cpu-list", &programs.agent_processor.to_string()]).arg(&programs.agent);
        let mut agent = Agent::start_by(pinned, &lab, &way.flags(programs.has_path))?;
        agent.wait_ready(READY_LIMIT)?;
        let course = Self { way, rules, rounds: Vec::new(), last: None, agent, pod, lab };
        course.wait_for_answer()?;
        Ok(course)
    }

    /// Waits until the agent knows the pod and has its credentials.
    fn wait_for_answer(&self) -> Result<()> {
        let destination = self.way.destination();
        let options = lab::pod_client::Options {
            to: Some(destination.ip()),
            port: destination.port(),
            imds: Imds::V1,
            ..lab::pod_client::Options::default()
        };
        let started = Instant::now();
        loop {
            let attempt = self.pod.ask_once(&options)?;
            if attempt.status == Some(200) && attempt.role.as_deref() == Some(ROLE) {
                return Ok(());
            }
            if started.elapsed() > ANSWER_LIMIT {
                bail!(
                    "the pod gets no credentials: {attempt:?}; the agent said:\n{}",
                    self.agent.log()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// One process in the pod asks, and says what it took.
    /// A pod that asks all the time is answered with 503: waits until what was asked in the last round, by connections of
    /// their own and by one, is part of its share again.
    fn wait_for_share(&mut self, requests: u32) {
        let needed = Duration::from_secs(1) * (2 * (requests + WARM_UP)) / REQUESTS_PER_SECOND;
        if let Some(last) = self.last {
            thread::sleep(needed.saturating_sub(last.elapsed()));
        }
        self.last = Some(Instant::now());
    }

    fn measure(&self, programs: &Programs, requests: u32) -> Result<Measured> {
        let mut client = self.pod.command("taskset")?;
        client.args(["--cpu-list", &programs.client_processor.to_string()]);
        client.arg(&programs.client).args(["pod-client", "bench"]);
        client.arg(format!("--to={}", self.way.destination()));
        client.args([format!("--role={ROLE}"), format!("--requests={requests}")]);
        let printed = printed(&mut client).with_context(|| {
            let (way, log) = (self.way.name(), self.agent.log());
            format!("{way} at {} rules; the agent said:\n{log}", self.rules)
        });
        serde_json::from_str(&printed?).context("reading what the client measured")
    }

    /// A packet of the pod's at the real metadata service would mean that the way was not the one it is named after.
    fn check_nothing_got_past(&self) -> Result<()> {
        let packets: u64 =
            self.pod.ips().into_iter().map(|address| self.lab.imds.packets_from(address)).sum();
        ensure!(
            packets == 0,
            "{} at {} rules: {packets} packets reached the real metadata service",
            self.way.name(),
            self.rules
        );
        Ok(())
    }

    fn series(&self) -> Series {
        Series { way: self.way, rules: self.rules, rounds: self.rounds.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_found_in_the_help() {
        assert!(has_path("      --path <PATH>\n          which way"));
        assert!(!has_path("  --allow-path <PATH>   metadata path, see --paths"));
    }

    #[test]
    fn document_names_the_command_that_repeats_it() {
        let options = Options {
            rounds: 3,
            requests: 50,
            rules: vec![0, 10],
            client_processor: 1,
            agent_processor: 0,
            agent: None,
            out: None,
        };
        assert_eq!(
            repeat(&options),
            "cargo xtask bench path --rounds=3 --requests=50 --rules=0,10 --client-processor=1 --agent-processor=0"
        );
    }
}

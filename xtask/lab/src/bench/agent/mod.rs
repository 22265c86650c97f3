//! `cargo xtask bench agent`: what a request, a pod's life and an idle node cost, beside a server that does nothing but
//! answer.

mod idle;
mod instructions;
mod load;
mod page;
pub(in crate::bench) mod picture;
mod records;
mod requests;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio::time::Instant;

use super::{
    machine::{self, Machine},
    programs, release_agent, restart,
    statistics::Range,
    write,
};
use xtask::{
    command::{command, output_of, run as run_command, say, workspace},
    toolchain,
};

/// What measures one group.
type Measure = fn(&Plan) -> Result<Vec<Figure>>;

/// How much to measure, and where to write it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds of load. In each, every kind of request is sent to the agent and to the bare server.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds of each load.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// One short round, for a machine that has other work: ratios hold roughly.
    #[arg(long)]
    quick: bool,
    /// The groups to measure, comma separated; absent: all.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<Group>,
    /// An agent that is built already; absent: this one, built as it is released.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// A bare server that is built already; absent: built as the agent is.
    #[arg(long)]
    bare: Option<PathBuf>,
    /// An agent with symbols, whose instructions for each request are counted. Absent: they are not.
    #[arg(long)]
    symbols: Option<PathBuf>,
    /// An earlier one, to compare the instructions with.
    #[arg(long, requires = "symbols")]
    before: Option<PathBuf>,
    /// The results, relative to the workspace.
    #[arg(long, default_value = "target/bench/agent.json")]
    out: PathBuf,
    /// Writes the page and its picture from the results, too.
    #[arg(long)]
    page: bool,
}

/// A group of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Group {
    /// Requests beside the bare server's, from the node.
    Requests,
    /// The same from inside a pod.
    Pods,
    /// Memory.
    Memory,
    /// CPU of changes in the Kubernetes API.
    Changes,
    /// Many pods at once.
    Crowds,
    /// Starts after `kill -9`, and takeovers.
    Restarts,
    /// The binary.
    Size,
    /// An idle node.
    Idle,
    /// What the kernel programs take for whoever has nothing to do with the agent.
    Programs,
    /// Instructions for each request.
    Instructions,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Results {
    command: String,
    day: String,
    agent: String,
    machine: Machine,
    load_before: String,
    load_after: String,
    seconds: f64,
    figures: Vec<Figure>,
    /// The costliest functions, in instructions for each request.
    functions: Vec<instructions::Function>,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
struct Figure {
    group: &'static str,
    name: String,
    unit: &'static str,
    /// The agent's.
    agent: Range,
    /// The bare server's, and the agent's as a ratio to it within each round.
    bare: Option<Range>,
    ratio: Option<Range>,
}

/// The programs that are measured, and how much.
#[derive(Debug)]
struct Plan {
    agent: PathBuf,
    bare: PathBuf,
    rounds: u32,
    seconds: u64,
    quick: bool,
}

/// Measures, and writes the results.
pub(super) fn run(options: &Options) -> Result<()> {
    toolchain::ensure_iproute()?;
    ensure!(
        output_of(command("wrk").arg("--version")).is_some() || wrk_is_there(),
        "the load is made by wrk, which is not installed (Debian: apt-get install wrk)"
    );
    let agent = release_agent(options.agent.as_deref())?;
    let plan = Plan {
        bare: bare(options.bare.as_deref())?,
        rounds: if options.quick { 1 } else { options.rounds },
        seconds: if options.quick { 1 } else { options.seconds },
        quick: options.quick,
        agent,
    };
    let version = output_of(command(&plan.agent).arg("--version"));
    let (load_before, started) = (machine::load(), Instant::now());
    let wants = |group| options.rows.is_empty() || options.rows.contains(&group);
    let mut figures = Vec::new();
    let groups: [(Group, Measure); 9] = [
        (Group::Requests, requests::on_node),
        (Group::Pods, requests::in_pods),
        (Group::Memory, records::memory),
        (Group::Changes, records::changes),
        (Group::Crowds, records::crowds),
        (Group::Restarts, restarts),
        (Group::Size, size),
        (Group::Idle, idle::idle),
        (Group::Programs, others),
    ];
    for (group, measure) in groups.into_iter().filter(|(group, _)| wants(*group)) {
        say(format!("measuring: {group:?}"));
        figures.extend(measure(&plan).with_context(|| format!("{group:?}"))?);
    }
    let functions = match &options.symbols {
        Some(symbols) if wants(Group::Instructions) => {
            let before = options.before.as_deref().map(instructions::count).transpose()?;
            let counts = instructions::count(symbols)?;
            figures.extend(instructions::figures(&counts, before.as_ref()));
            instructions::functions(&counts, before.as_ref())
        }
        _ => Vec::new(),
    };
    let results = Results {
        command: repeat(options),
        day: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        agent: version.context("asking the agent for its version")?.trim().to_owned(),
        machine: Machine::look(),
        load_before,
        load_after: machine::load(),
        seconds: started.elapsed().as_secs_f64().round(),
        figures,
        functions,
    };
    let text = serde_json::to_string_pretty(&results).context("results are JSON")?;
    write(&workspace().join(&options.out), &text)?;
    print!("{}", page::tables(&results));
    if options.page {
        page::write(&results)?;
    }
    Ok(())
}

/// wrk has no flag that ends well.
fn wrk_is_there() -> bool {
    command("wrk").arg("--version").output().is_ok()
}

/// The server to compare with, built as the agent is.
fn bare(built: Option<&Path>) -> Result<PathBuf> {
    if let Some(built) = built {
        return Ok(workspace().join(built));
    }
    run_command(command("cargo").args(["build", "--release", "--package", "bare"]))?;
    Ok(target().join("release/bare"))
}

/// Cargo's target folder.
fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn restarts(plan: &Plan) -> Result<Vec<Figure>> {
    let (rounds, pods) = if plan.quick { (1, 5) } else { (5, 30) };
    let measured = restart::measure(&plan.agent, rounds, pods, 50)?;
    let figures = [
        ("a start after `kill -9`: the first answer", &measured.killed_answer),
        ("a start after `kill -9`: ready", &measured.killed_ready),
        ("a takeover: it listens", &measured.beside_listens),
        ("a takeover: ready", &measured.beside_ready),
    ];
    let named = |name| format!("{name}, {pods} pods and roles");
    let figures = figures.into_iter();
    Ok(figures.filter_map(|(name, it)| Figure::of("restarts", named(name), "ms", it)).collect())
}

fn others(plan: &Plan) -> Result<Vec<Figure>> {
    let (rounds, repeat) = if plan.quick { (2, 500) } else { (10, 5_000) };
    let found = programs::beyond_empty(&plan.agent, rounds, repeat)?;
    let named = |what| format!("an unrelated {what}: the program beyond an empty one");
    let found = found.into_iter();
    Ok(found.filter_map(|(what, it)| Figure::of("programs", named(what), "ns", &it)).collect())
}

fn size(plan: &Plan) -> Result<Vec<Figure>> {
    let bytes = std::fs::metadata(&plan.agent).context("the agent's size")?.len();
    Ok(vec![Figure::one("size", "binary", "MB", bytes as f64 / 1e6)])
}

fn repeat(options: &Options) -> String {
    let mut command = "cargo xtask bench agent --page".to_owned();
    if options.quick {
        command.push_str(" --quick");
    } else {
        command.push_str(&format!(" --rounds={} --seconds={}", options.rounds, options.seconds));
    }
    command
}

// === impl Figure ===

impl Figure {
    fn one(group: &'static str, name: impl Into<String>, unit: &'static str, value: f64) -> Self {
        let agent = Range { median: value, min: value, max: value };
        Self { group, name: name.into(), unit, agent, bare: None, ratio: None }
    }

    /// That of several measurements; none of none.
    fn of(
        group: &'static str,
        name: impl Into<String>,
        unit: &'static str,
        values: &[f64],
    ) -> Option<Self> {
        let agent = Range::of(values.iter().copied())?;
        Some(Self { group, name: name.into(), unit, agent, bare: None, ratio: None })
    }

    /// The same, with what the bare server did in the same rounds.
    fn beside(mut self, values: &[f64], bare: &[f64]) -> Self {
        self.bare = Range::of(bare.iter().copied());
        self.ratio = Range::of_ratios(values, bare);
        self
    }
}

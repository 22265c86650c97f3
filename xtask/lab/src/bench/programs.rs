//! `cargo xtask bench programs`: what the agent's kernel programs cost whoever has nothing to do with the agent.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use kiam_common::names::program;
use lab::{Agent, Attaching, ForeignProgram, Lab, LabPod, PodSpec, Runs, program_ids};

use super::{
    Subject,
    machine::{self, Machine},
    statistics::Range,
    write,
};
use xtask::command::{say, workspace};

/// The agent's programs at hooks of cgroups: the hook as `enum bpf_attach_type` has it, and what runs it.
const HOOKS: [(&str, u32, &str); 10] = [
    (program::CONNECT4, 10, "connect by IPv4"),
    (program::CONNECT6, 11, "connect by IPv6"),
    (program::SENDMSG4, 14, "datagram by IPv4"),
    (program::SENDMSG6, 15, "datagram by IPv6"),
    (program::BIND4, 8, "bind by IPv4"),
    (program::BIND6, 9, "bind by IPv6"),
    (program::GETPEERNAME4, 29, "getpeername by IPv4"),
    (program::GETPEERNAME6, 30, "getpeername by IPv6"),
    (program::SOCK_OPS, 3, "event of a TCP connection"),
    (program::GUARD, 1, "packet of a pod (`--guard=skb`)"),
];
const STATISTICS: &str = "/proc/sys/kernel/bpf_stats_enabled";
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);
/// The most that a program is to take over an empty one, in nanoseconds.
const GOAL: f64 = 30.0;

/// How much to measure, and where to write it.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds, of which medians are taken; one more before them is not counted.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Connections, datagrams and binds of a round, by each family.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repeat: u32,
    /// An agent that is built already; absent: this one, built as it is released.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// The document to write, relative to the workspace.
    #[arg(long, default_value = "docs/programs.md")]
    out: PathBuf,
}

/// One of the agent's programs beside an empty one at the same hook.
struct Pair {
    name: &'static str,
    what: &'static str,
    own: u32,
    empty: ForeignProgram,
    /// Nanoseconds a run, by round.
    own_nanos: Vec<f64>,
    empty_nanos: Vec<f64>,
    /// Runs of all rounds.
    runs: u64,
}

/// The kernel counts programs' runs while this lives.
struct Counting {
    before: String,
}

/// Measures, and writes the document.
pub(super) fn run(options: &Options) -> Result<()> {
    let subject = Subject::prepare(options.agent.as_deref())?;
    let pairs = pairs(&subject.binary, options.rounds, options.repeat)?;
    let text = render(options, &pairs, &subject);
    write(&workspace().join(&options.out), &text)
}

/// What each program took beyond an empty one, in nanoseconds by round, with what runs it.
pub(super) fn beyond_empty(
    binary: &Path,
    rounds: u32,
    repeat: u32,
) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let pairs = pairs(binary, rounds, repeat)?;
    let beyond = |pair: &Pair| {
        let both = pair.own_nanos.iter().zip(&pair.empty_nanos);
        (pair.what, both.map(|(own, empty)| own - empty).collect())
    };
    Ok(pairs.iter().map(beyond).collect())
}

/// The agent's programs beside empty ones, measured.
fn pairs(binary: &Path, rounds: u32, repeat: u32) -> Result<Vec<Pair>> {
    let lab = Lab::start()?;
    let pod = lab.pod(PodSpec::new("shop", "reader").role("reader"))?;
    let mut agent = Agent::start(&lab, binary, &["--guard=route,skb"])?;
    agent.wait_ready(LIMIT)?;
    let mut pairs = HOOKS
        .into_iter()
        .map(|hook| Pair::beside(lab.node.kubepods(), hook))
        .collect::<Result<Vec<_>>>()?;
    let _counting = Counting::begin()?;
    for round in 0..=rounds {
        say(format!("round {round} of {rounds} (the first is not counted)"));
        measure(&mut pairs, &pod, repeat, round > 0)?;
    }
    Ok(pairs)
}

fn measure(pairs: &mut [Pair], pod: &LabPod, repeat: u32, counts: bool) -> Result<()> {
    let read = |pairs: &[Pair]| -> Result<Vec<_>> {
        pairs.iter().map(|pair| Ok((Runs::of(pair.own)?, pair.empty.runs()?))).collect()
    };
    let before = read(pairs)?;
    let this = std::env::current_exe().context("asking for the running binary")?;
    let mut client = pod.command(this)?;
    let ended = client.args(["pod-client", "unrelated", &repeat.to_string()]).output();
    let ended = ended.context("starting the client of the lab")?;
    ensure!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let after = read(pairs)?;
    for (pair, (before, after)) in pairs.iter_mut().zip(before.into_iter().zip(after)) {
        let (own, empty) = (after.0.since(before.0), after.1.since(before.1));
        if counts && own.count > 0 && empty.count > 0 {
            pair.own_nanos.push(own.nanos as f64 / own.count as f64);
            pair.empty_nanos.push(empty.nanos as f64 / empty.count as f64);
            pair.runs += own.count;
        }
    }
    Ok(())
}

// === impl Pair ===

impl Pair {
    fn beside(
        cgroup: &Path,
        (name, hook, what): (&'static str, u32, &'static str),
    ) -> Result<Self> {
        let ids = program_ids(cgroup, hook)?;
        let [own] = ids[..] else { bail!("{} programs at the hook of {name}, not one", ids.len()) };
        let empty = ForeignProgram::attach_at(cgroup, hook, "empty", Attaching::Multi)?;
        let (own_nanos, empty_nanos) = (Vec::new(), Vec::new());
        Ok(Self { name, what, own, empty, own_nanos, empty_nanos, runs: 0 })
    }

    /// A row of the table; nothing of a program that did not run, as there is no IPv6.
    fn row(&self) -> Option<(String, f64)> {
        let median = |nanos: &[f64]| Some(Range::of(nanos.iter().copied())?.median);
        let more = self.own_nanos.iter().zip(&self.empty_nanos).map(|(own, empty)| own - empty);
        let Range { median: over, min, max } = Range::of(more)?;
        let row = format!(
            "| `{}` | {} | {} | {:.0} | {:.0} | {over:.0} | {min:.0} to {max:.0} |\n",
            self.name,
            self.what,
            self.runs,
            median(&self.own_nanos)?,
            median(&self.empty_nanos)?,
        );
        Some((row, over))
    }
}

// === impl Counting ===

impl Counting {
    fn begin() -> Result<Self> {
        let failed = || format!("having the kernel count programs' runs ({STATISTICS})");
        let before = fs::read_to_string(STATISTICS).with_context(failed)?;
        fs::write(STATISTICS, "1").with_context(failed)?;
        Ok(Self { before })
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATISTICS, &self.before) {
            eprintln!("lab: {STATISTICS} stays on: {error}");
        }
    }
}

/// The document's text.
fn render(options: &Options, pairs: &[Pair], subject: &Subject) -> String {
    let Subject { version, load_before, .. } = subject;
    let machine = Machine::look();
    let below = if machine.is_virtual { ", virtual" } else { "" };
    let rows: Vec<(String, f64)> = pairs.iter().filter_map(Pair::row).collect();
    let kept = rows.iter().filter(|(_, over)| *over <= GOAL).count();
    let all = rows.len();
    let table: String = rows.into_iter().map(|(row, _)| row).collect();
    format!(
        "# What the kernel programs cost others\n\n\
         For operators and reviewers: the time of each of the agent's programs for connections,\n\
         datagrams, binds and packets of pods that have nothing to do with the agent. Written by\n\n\
         ```sh\ncargo xtask bench programs --rounds={} --repeat={}\n```\n\n\
         as root. Do not edit this page; run the command again.\n\n\
         | | |\n| --- | --- |\n| day | {} |\n| agent | {version}, `--guard=route,skb` |\n\
         | processor | {}, {} threads{below} |\n| kernel | {} |\n\
         | load average before, after (1, 5, 15 minutes) | {load_before}; {} |\n| rounds | {} |\n\n\
         Nanoseconds a run, medians of the rounds. *Empty* is a program of the same type that lets\n\
         everything pass, at the same hook of the same cgroup, run by the same events. The goal is\n\
         at most {GOAL:.0} ns over it: {kept} of {all} programs kept it here.\n\n\
         | program | runs for each | runs | agent | empty | over it | rounds |\n\
         | --- | --- | --: | --: | --: | --: | --: |\n{table}{METHOD}",
        options.rounds,
        options.repeat,
        jiff::Timestamp::now().strftime("%Y-%m-%d"),
        machine.processor,
        machine.cores,
        machine.kernel,
        machine::load(),
        options.rounds,
    )
}

const METHOD: &str = "
## Method

The kernel counts each program's runs and their time (`kernel.bpf_stats_enabled`), which takes some
time itself, of both programs alike. The node is made of network namespaces. A process in a pod
connects, sends datagrams and binds over loopback, by IPv4 and by IPv6.

Not here are `kiam_listener`, which sees packets to the agent's own listeners alone, `kiam_uplink`
(`--guard=uplink`), and what runs only while the agent starts or tests itself.
";

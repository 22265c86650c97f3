//! The second part of `docs/benchmarks.md`, made from what was measured. What it concludes is computed, so that it can't be kinder than the
//! numbers.

use std::fmt::Write as _;
use std::time::Duration;

use lab::pod_client::bench::{Measured, Spread};

use super::agent::picture::{Bars, draw};
use super::machine::Machine;
use super::rules::Tools;
use super::statistics::Range;
use super::way::{Place, Way};
use xtask::page::table;

/// The pod-local path is to be so much faster than a direct connection to the node, without rules.
const GOAL_TO_DIRECT: f64 = 0.95;
/// And so little slower with the most rules than without.
const GOAL_TO_OWN: f64 = 1.1;

/// Everything that was found.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) tools: Tools,
    pub(super) load_before: String,
    pub(super) load_after: String,
    pub(super) took: Duration,
    pub(super) day: String,
    /// What it says of its version.
    pub(super) agent: String,
    pub(super) requests: u32,
    /// Those of the client and of the agent.
    pub(super) processors: (u32, u32),
    pub(super) command: String,
    pub(super) series: Vec<Series>,
    /// What was not measured, and why.
    pub(super) left_out: Vec<String>,
}

/// What was measured by one way at one number of rules, round by round.
#[derive(Debug)]
pub(super) struct Series {
    pub(super) way: Way,
    pub(super) rules: u32,
    pub(super) rounds: Vec<Measured>,
}

/// A kind of request.
type Kind = fn(&Measured) -> Spread;

const FRESH: Kind = |measured| measured.fresh;
const KEPT: Kind = |measured| measured.kept;

/// The picture of the ways: a new connection for each request.
pub(super) fn picture(report: &Report) -> String {
    let most = report.series.iter().map(|series| series.rules).max().unwrap_or(0);
    let p50 = |way: Way, rules: u32| {
        let mut found = report.series.iter().filter(|it| it.way == way && it.rules == rules);
        let rounds = &found.next()?.rounds;
        let micros = rounds.iter().map(|round| FRESH(round).p50 as f64 / 1e3);
        Range::of(micros).map(|range| range.median)
    };
    let bars = Way::ALL.into_iter().filter_map(|way| {
        let values = [("without rules", p50(way, 0)), ("with the most rules", p50(way, most))];
        let values: Vec<_> =
            values.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        (!values.is_empty()).then(|| Bars { label: way.name().to_owned(), values })
    });
    let title = format!("A new connection and its answer, without and with {most} rules");
    draw(&title, "µs, p50", &bars.collect::<Vec<_>>())
}

/// The document's text.
pub(super) fn render(report: &Report) -> String {
    [
        head(report),
        METHOD.to_owned(),
        "![A new connection for each request, by way](images/paths.svg)\n".to_owned(),
        fresh_table(report),
        comparison(report),
        kept_table(report),
        conclusions(report),
        LIMITS.to_owned(),
    ]
    .join("\n")
}

const METHOD: &str = "\
### Method

For every way at every number of rules there is a lab node: network namespaces, veths routed as
Calico and the VPC CNI do it, cgroups as the kubelet's. Each node has its own agent (the same
release build) and one pod, and all are up at once. In each round a client in each pod sends its
requests, one process after the other. Each round starts at another way, and every other round goes
backwards. A first round is not counted, and neither are the first 20 requests of a process.

Every request is `GET /latest/meta-data/iam/security-credentials/` by IMDSv1. *New connection* is
measured from before `connect` to the end of the stream. *Kept connection* is measured from before
the request is written to the last byte of its answer. A wrong answer, an error, or a packet at the
real metadata service ends the run without a document.

The ways are:

- *direct* connects to the node's address and the agent's port, without a hook or a translation.
- *eBPF* connects to 169.254.169.254:80 and is redirected by the kernel program, to the node
  listener (*node path*) or to the pod listener (*pod-local*), with the guards.
- *DNAT* connects to 169.254.169.254:80 and is translated by a rule of iptables or a chain of
  nftables. *Last* is after kube-proxy's rules (as kiam's agent appends it), *first* is before them.

The agent is the same by every way, and so is what it does with a request. It identifies the caller
by the kernel's record with eBPF, and by the source address with the others.

Rules are as kube-proxy's iptables mode writes them: one for each service, in a chain that nat
PREROUTING calls. At 0 rules there is neither a rule nor connection tracking, except what the DNAT
itself needs.
";

const LIMITS: &str = "\
### What this does not say

- Absolute speed elsewhere. This is one machine with virtual links, one client at a time, and a
  stand-in for a node. Ratios within a round are what carries over.
- The cost of waking another processor. Client and agent share one processor, where the scheduler
  mostly has them if nobody pins them. Where they are apart, times are longer and less steady, and
  pod-local gains nothing on *direct*. `--client-processor=1` measures that.
- Much about the links themselves. The pod listener accepts a connection once its request is there
  (`TCP_DEFER_ACCEPT`), so the agent is woken once. The node listener, whose queue all pods share,
  does not. That is most of what makes pod-local faster than *direct* where no rule is in the way.
- kube-proxy's nftables or IPVS mode, or Cilium. They have no such list to walk, so only the figures
  at 0 rules apply.
- Throughput, or many clients at once. A DNAT also keeps an entry of connection tracking for each
  connection, which is not counted here.
- The value of an identity. *direct* and *DNAT* learn the caller from the source address alone.
  eBPF's figures include the kernel's identity, which the others do not have.
- A node without connection tracking. On a node with kube-proxy it is on; here it is on from 1 rule.
- Differences smaller than that between two ways that are the same (above): these are noise.
";

fn head(report: &Report) -> String {
    let machine = &report.machine;
    let below = if machine.is_virtual { ", virtual" } else { "" };
    let version = |version: &Option<String>| version.clone().unwrap_or("not there".to_owned());
    let mut text = format!(
        "```sh\n{}\n```\n\n\
         as root. It takes less than six minutes on two cores.\n\n\
         | | |\n| --- | --- |\n\
         | day | {} |\n| agent | {} |\n| processor | {}, {} threads{below} |\n| kernel | {} |\n\
         | load average before, after (1, 5, 15 minutes) | {}; {} |\n\
         | packet filters | {}; {} |\n\
         | processors | client on {}, agent on {} |\n\
         | rounds | {}, each {} requests of each kind by each way, {} s in all |\n",
        report.command,
        report.day,
        report.agent,
        machine.processor,
        machine.cores,
        machine.kernel,
        report.load_before,
        report.load_after,
        version(&report.tools.iptables),
        version(&report.tools.nftables),
        report.processors.0,
        report.processors.1,
        report.series.first().map_or(0, |series| series.rounds.len()),
        report.requests,
        report.took.as_secs(),
    );
    if !report.left_out.is_empty() {
        text.push_str("\nNot measured:\n\n");
        report.left_out.iter().for_each(|line| text.push_str(&format!("- {line}\n")));
    }
    text
}

fn fresh_table(report: &Report) -> String {
    let head = [
        "rules",
        "way",
        "p50",
        "p90",
        "fastest",
        "to direct, same rules",
        "to itself without rules",
    ];
    let rows = report.series.iter().map(|series| {
        let fastest = Range::of(series.rounds.iter().map(|round| micros(round.fresh.min)));
        vec![
            series.rules.to_string(),
            series.way.name().to_owned(),
            times(series.over_rounds(FRESH, |spread| spread.p50)),
            times(series.over_rounds(FRESH, |spread| spread.p90)),
            fastest.map_or(String::new(), |fastest| time(fastest.min)),
            ratio(report.ratio(series, Way::Direct, series.rules, FRESH)),
            ratio(report.ratio(series, series.way, 0, FRESH)),
        ]
    });
    format!(
        "### A new connection for each request\n\n\
        Microseconds. p50 and p90 are medians over the rounds, with the smallest and the largest round. Ratios\n\
        are of p50 within a round: their median (smallest..largest).\n\n{}",
        table(&head, 1..2, rows)
    )
}

fn comparison(report: &Report) -> String {
    let others: Vec<Way> = Way::ALL
        .into_iter()
        .filter(|way| !way.is_ours() && report.series.iter().any(|series| series.way == *way))
        .collect();
    let head: Vec<&str> =
        ["rules", ""].into_iter().chain(others.iter().map(|way| way.name())).collect();
    let ours = report.series.iter().filter(|series| series.way.is_ours());
    let rows = ours.map(|series| {
        let ratio = |other: &Way| {
            let ratio = report.ratio(series, *other, series.rules, FRESH);
            ratio.map_or(String::new(), |ratio| emphasised(ratio.median))
        };
        let first = [series.rules.to_string(), series.way.name().to_owned()];
        first.into_iter().chain(others.iter().map(ratio)).collect()
    });
    format!(
        "#### eBPF as a ratio to each other way, at the same rules\n\n\
        Median over rounds. Above 1 (bold), eBPF is slower.\n\n{}",
        table(&head, 1..2, rows)
    )
}

fn kept_table(report: &Report) -> String {
    let rows = report.series.iter().map(|series| {
        vec![
            series.rules.to_string(),
            series.way.name().to_owned(),
            times(series.over_rounds(KEPT, |spread| spread.p50)),
            times(series.over_rounds(KEPT, |spread| spread.p90)),
            ratio(report.ratio(series, Way::Direct, series.rules, KEPT)),
        ]
    });
    format!(
        "### One connection for all requests\n\nMicroseconds for each request, as above.\n\n{}",
        table(&["rules", "way", "p50", "p90", "to direct, same rules"], 1..2, rows)
    )
}

fn conclusions(report: &Report) -> String {
    let mut text = "### What this says\n\n".to_owned();
    let most = report.series.iter().map(|series| series.rules).max().unwrap_or(0);
    let pod_local = |rules| report.find(Way::PodLocal, rules);
    let goals = [
        pod_local(0).and_then(|series| {
            let found = report.ratio(series, Way::Direct, 0, FRESH)?;
            Some((
                "to a direct connection to the node, at 0 rules".to_owned(),
                found,
                GOAL_TO_DIRECT,
            ))
        }),
        pod_local(most).filter(|_| most > 0).and_then(|series| {
            let found = report.ratio(series, Way::PodLocal, 0, FRESH)?;
            Some((format!("at {most} rules to itself at 0"), found, GOAL_TO_OWN))
        }),
    ];
    for (what, found, goal) in goals.into_iter().flatten() {
        let verdict = if found.median <= goal { "met" } else { "**missed**" };
        let found = ratio(Some(found));
        writeln!(text, "- Pod-local {what}: {found}; the goal is at most {goal}: {verdict}.")
            .expect("a String takes what is written");
    }
    for series in report.series.iter().filter(|series| series.rules == most && most > 0) {
        let Some(found) = report.ratio(series, series.way, 0, FRESH) else { continue };
        let found = ratio(Some(found));
        writeln!(text, "- {most} rules make *{}* {found} times as long.", series.way.name())
            .expect("a String takes what is written");
    }
    text.push_str(&noise(report));
    text
}

/// Without rules, before and after them are the same: what differs is how exact all this is.
fn noise(report: &Report) -> String {
    let pairs: [fn(Place) -> Way; 2] = [Way::Iptables, Way::Nftables];
    let mut text = String::new();
    for way in pairs {
        let found = report
            .find(way(Place::Last), 0)
            .and_then(|series| report.ratio(series, way(Place::First), 0, FRESH));
        if let Some(found) = found {
            writeln!(
                text,
                "- Noise: *{}* and *{}* are the same thing at 0 rules; measured, one to the other is {}.",
                way(Place::Last).name(),
                way(Place::First).name(),
                ratio(Some(found))
            )
            .expect("a String takes what is written");
        }
    }
    text
}

// === impl Report ===

impl Report {
    fn find(&self, way: Way, rules: u32) -> Option<&Series> {
        self.series.iter().find(|series| series.way == way && series.rules == rules)
    }

    /// The medians of `series` as ratios to those of another, round by round; none to itself.
    fn ratio(&self, series: &Series, way: Way, rules: u32, kind: Kind) -> Option<Range> {
        let other = self.find(way, rules).filter(|other| !std::ptr::eq(*other, series))?;
        Range::of_ratios(&series.medians(kind), &other.medians(kind))
    }
}

// === impl Series ===

impl Series {
    fn medians(&self, kind: Kind) -> Vec<f64> {
        self.rounds.iter().map(|round| micros(kind(round).p50)).collect()
    }

    fn over_rounds(&self, kind: Kind, value: fn(Spread) -> u64) -> Option<Range> {
        Range::of(self.rounds.iter().map(|round| micros(value(kind(round)))))
    }
}

// === numbers ===

fn micros(nanos: u64) -> f64 {
    Duration::from_nanos(nanos).as_secs_f64() * 1e6
}

fn time(micros: f64) -> String {
    if micros < 1000.0 { format!("{micros:.1}") } else { format!("{micros:.0}") }
}

fn times(range: Option<Range>) -> String {
    range.map_or(String::new(), |range| {
        format!("{} ({}..{})", time(range.median), time(range.min), time(range.max))
    })
}

fn ratio(range: Option<Range>) -> String {
    range.map_or(String::new(), |range| {
        format!("{:.2} ({:.2}..{:.2})", range.median, range.min, range.max)
    })
}

fn emphasised(ratio: f64) -> String {
    let text = format!("{ratio:.2}");
    // As it is shown: 1.00 is no loss.
    if ratio >= 1.005 { format!("**{text}**") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(way: Way, rules: u32, medians: &[u64]) -> Series {
        let round = |micros: &u64| {
            let p50 = micros * 1000;
            let spread = Spread { count: 9, min: p50 / 2, p50, p90: p50 * 2, max: p50 * 3 };
            Measured { fresh: spread, kept: spread }
        };
        Series { way, rules, rounds: medians.iter().map(round).collect() }
    }

    fn report(pod_local_at_most: u64) -> Report {
        Report {
            machine: Machine {
                processor: "Some CPU".to_owned(),
                cores: 2,
                is_virtual: true,
                kernel: "6.18.0".to_owned(),
            },
            tools: Tools {
                iptables: Some("iptables v1.8.9 (nf_tables)".to_owned()),
                nftables: None,
            },
            load_before: "0.1 0.2 0.3".to_owned(),
            load_after: "1.1 1.2 1.3".to_owned(),
            took: Duration::from_secs(61),
            day: "2026-01-02".to_owned(),
            agent: "kiam-agent 1.2.3".to_owned(),
            requests: 9,
            processors: (1, 0),
            command: "cargo xtask bench path".to_owned(),
            series: vec![
                series(Way::Direct, 0, &[100, 200, 100]),
                series(Way::Node, 0, &[110, 220, 110]),
                series(Way::PodLocal, 0, &[80, 160, 80]),
                series(Way::Iptables(Place::Last), 0, &[120, 240, 120]),
                series(Way::Iptables(Place::First), 0, &[100, 240, 120]),
                series(Way::Direct, 50, &[1000, 1500, 1200]),
                series(Way::PodLocal, 50, &[pod_local_at_most; 3]),
                series(Way::Iptables(Place::First), 50, &[125, 130, 125]),
            ],
            left_out: vec!["nftables DNAT: nftables is not installed".to_owned()],
        }
    }

    fn has_line(text: &str, line: &str) {
        assert!(text.lines().any(|found| found == line), "no line\n{line}\nin\n{text}");
    }

    #[test]
    fn tables_show_medians_with_their_spread_and_ratios_within_rounds() {
        let text = render(&report(84));
        has_line(
            &text,
            "| 0 | eBPF, node path | 110.0 (110.0..220.0) | 220.0 (220.0..440.0) | 55.0 | 1.10 (1.10..1.10) |  |",
        );
        has_line(
            &text,
            "| 50 | direct | 1200 (1000..1500) | 2400 (2000..3000) | 500.0 |  | 10.00 (7.50..12.00) |",
        );
        has_line(
            &text,
            "| 0 | eBPF, pod-local | 80.0 (80.0..160.0) | 160.0 (160.0..320.0) | 0.80 (0.80..0.80) |",
        );
        has_line(&text, "- nftables DNAT: nftables is not installed");
        has_line(&text, "| processor | Some CPU, 2 threads, virtual |");
    }

    #[test]
    fn a_lost_comparison_stands_out() {
        let text = render(&report(132));
        has_line(&text, "| 0 | eBPF, node path | **1.10** | 0.92 | 0.92 |");
        // No iptables DNAT after 50 rules was measured.
        has_line(&text, "| 50 | eBPF, pod-local | 0.11 |  | **1.06** |");
    }

    #[test]
    fn goals_are_judged_by_the_numbers() {
        let met = render(&report(80));
        has_line(
            &met,
            "- Pod-local to a direct connection to the node, at 0 rules: 0.80 (0.80..0.80); the goal is at most 0.95: met.",
        );
        has_line(
            &met,
            "- Pod-local at 50 rules to itself at 0: 1.00 (0.50..1.00); the goal is at most 1.1: met.",
        );
        let missed = render(&report(100));
        assert!(missed.contains("the goal is at most 1.1: **missed**."), "{missed}");
        has_line(
            &met,
            "- Noise: *iptables DNAT, last* and *iptables DNAT, first* are the same thing at 0 rules; measured, one to \
             the other is 1.00 (1.00..1.20).",
        );
    }
}

//! The figures as tables: for the terminal, and for `docs/benchmarks.md`.

use anyhow::Result;
use xtask::{command::workspace, page::table};

use super::{
    super::{statistics::Range, write as write_file},
    Figure, Results,
    picture::{Bars, draw},
};

const PAGE: &str = "docs/benchmarks.md";
const PICTURE: &str = "docs/images/requests.svg";
const COMMAND: &str = "cargo xtask bench agent";

/// Writes the page and its picture.
pub(super) fn write(results: &Results) -> Result<()> {
    let head = format!(
        "```sh\n{}\n```\n\nas root, with wrk. The results are in `target/bench/agent.json`, too.\n\n\
         | | |\n| --- | --- |\n| day | {} |\n| agent | {} |\n| processor | {}, {} threads{} |\n| kernel | {} |\n\
         | load average before, after (1, 5, 15 minutes) | {}; {} |\n| took | {} s |\n",
        results.command,
        results.day,
        results.agent,
        results.machine.processor,
        results.machine.cores,
        if results.machine.is_virtual { ", virtual" } else { "" },
        results.machine.kernel,
        results.load_before,
        results.load_after,
        results.seconds,
    );
    let picture = "![Requests a second, the agent beside the bare server](images/requests.svg)\n";
    let text = [head.as_str(), METHOD, picture, &tables(results)].join("\n");
    xtask::page::write(PAGE, COMMAND, &text)?;
    write_file(&workspace().join(PICTURE), &requests(results))
}

const METHOD: &str = "\
The *bare* server is hyper from the same lock file, built by the same profile, with the same headers
and bodies. It only answers. In each round wrk sends every kind of request to both, on 32 connections
from two threads, and the rounds take turns in their order. Figures are medians over the rounds, with
the smallest and the largest. A ratio is of the agent to the bare server within a round. CPU is user
and system time of the server's process for each request. *Kept* connections are used for all
requests. The agent limits a pod to 200 requests a second; here it is configured not to.

*From a pod*: wrk is a process of the pod, the agent is behind the kernel programs, and the bare
server is reached by the node's address. Elsewhere the agent knows pods by their addresses on
loopback. An *event* is one of the four of a pod's life: scheduled, running, ended, deleted. Records
of pods have 5.9 kB. STS answers after 50 ms.
";

/// The figures' tables.
pub(super) fn tables(results: &Results) -> String {
    let of = |group: &str| -> Vec<&Figure> {
        results.figures.iter().filter(|figure| figure.group == group).collect()
    };
    let mut text = String::new();
    for (group, title) in [("requests", "### Requests"), ("pods", "### Requests from inside a pod")]
    {
        let figures = of(group);
        if !figures.is_empty() {
            let head = ["request", "", "agent", "bare", "ratio"];
            let rows = figures.into_iter().map(|figure| {
                let range = |range: &Option<Range>| range.as_ref().map_or(String::new(), shown);
                let name = vec![figure.name.clone(), figure.unit.to_owned()];
                [name, vec![shown(&figure.agent), range(&figure.bare), range(&figure.ratio)]]
                    .concat()
            });
            text.push_str(&format!("{title}\n\n{}\n", table(&head, 0..2, rows)));
        }
    }
    let rest: Vec<_> =
        ["memory", "changes", "crowds", "restarts", "size", "idle", "programs", "instructions"]
            .into_iter()
            .flat_map(of)
            .map(|figure| vec![figure.name.clone(), figure.unit.to_owned(), shown(&figure.agent)])
            .collect();
    if !rest.is_empty() {
        text.push_str(&format!("### All else\n\n{}\n", table(&["", "", "agent"], 0..2, rest)));
    }
    if !results.functions.is_empty() {
        text.push_str("### The costliest functions\n\n");
        text.push_str("Instructions for each request, without those of callees, as callgrind counts them: credentials by\n");
        text.push_str("IMDSv1 on a kept connection. The kernel's are not counted.\n\n");
        let rows = results.functions.iter().map(super::instructions::Function::row);
        text.push_str(&table(&["function", "before", "now"], 0..1, rows));
        text.push('\n');
    }
    text
}

fn requests(results: &Results) -> String {
    let bars: Vec<_> = results
        .figures
        .iter()
        // One compares the agent with itself.
        .filter(|figure| figure.unit == "req/s" && !figure.name.contains("beside"))
        .filter_map(|figure| {
            let values = vec![("agent", figure.agent.median), ("bare", figure.bare?.median)];
            ["requests", "pods"]
                .contains(&figure.group)
                .then(|| Bars { label: figure.name.clone(), values })
        })
        .collect();
    draw("The agent beside a server that only answers", "requests a second", &bars)
}

fn shown(range: &Range) -> String {
    let number = |value: f64| match value {
        value if value >= 1_000.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    };
    let Range { median, min, max } = *range;
    if min >= max {
        return number(median);
    }
    format!("{} ({}..{})", number(median), number(min), number(max))
}

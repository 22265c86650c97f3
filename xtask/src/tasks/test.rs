//! `cargo xtask test`: everything a change must pass, step by step, with a table of what ran at the end.

use std::fmt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::{Args, ValueEnum};
use tokio::time::Instant;

use super::{chart, image, kernels, kubernetes, lab, tidy};
use xtask::command::{command, run, say};
use xtask::{build, prometheus::Prometheus, toolchain};

/// What to test, and how strictly.
#[derive(Debug, Args)]
pub(crate) struct Selection {
    /// Fail tests that can't run here, for want of root or of BPF, instead of skipping them.
    #[arg(long)]
    no_skip: bool,
    /// The parts to run. Default: all but `sdks`, `image`, `policies`, `apiserver`, `node-vm`, `cluster`, `kernels` and
    /// `dashboards`.
    /// `node` includes `runtime` and `hostile`.
    #[arg(value_enum)]
    parts: Vec<Part>,
    #[command(flatten)]
    kernels: kernels::Options,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Format, lints, layers and documents.
    Checks,
    /// Tests beside the code.
    Unit,
    /// The Helm chart, rendered by Helm, beside what kustomize makes of `deploy/`. Downloads both once.
    Chart,
    /// Tests of the agent as a process, with root in network namespaces and cgroups.
    Node,
    /// Node tests with pods of a real container runtime, which is installed first.
    Runtime,
    /// Node tests in which one pod attacks and another is measured. Prints a table.
    Hostile,
    /// The kernel programs, loaded and attached on Debian's x86_64 kernels from 5.10 to the newest, in QEMU.
    KernelLoad,
    /// The alerts, fired by faults of a real agent in a real Prometheus, and the queries of the dashboard. Takes minutes.
    Dashboards,
    /// Real AWS clients against the agent.
    Clients,
    /// Many more AWS clients, old and new. Downloads 4 GB once; writes the table of `docs/clients.md`.
    Sdks,
    /// The container image, built in two folders, compared and run. Takes long: four release builds.
    Image,
    /// The admission policies, judged by Kubernetes' own code. Builds that code once, which takes minutes.
    Policies,
    /// The agent against a real kube-apiserver. Builds the server once, which takes minutes.
    Apiserver,
    /// The agent on a whole node: systemd, cgroup v2 and containerd on another kernel. Makes the node once, which takes
    /// minutes.
    NodeVm,
    /// The agent in a Kubernetes cluster with such a node, which is built once: ten minutes and 3 GB. Writes the table of
    /// `docs/clusters.md`.
    Cluster,
    /// The kernel programs and the agent on Debian's kernels from 5.10 to the newest, in QEMU. Writes the tables of
    /// `docs/kernels.md`.
    Kernels,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().expect("no part is hidden").get_name())
    }
}

struct Step {
    part: Part,
    name: &'static str,
    action: fn(&Selection) -> Result<()>,
}

const STEPS: [Step; 20] = [
    Step { part: Part::Checks, name: "format", action: |_| run(cargo("fmt").arg("--check")) },
    Step { part: Part::Checks, name: "tidy", action: |_| tidy::run() },
    Step { part: Part::Checks, name: "lints", action: |_| run(&mut lints()) },
    Step { part: Part::Checks, name: "kernel lints", action: |_| run(&mut build::ebpf_lints()) },
    Step {
        part: Part::Unit,
        name: "unit tests",
        action: |selection| {
            // Those of the kernel's crate have processes of the lab's send packets.
            build::programs()?;
            run(tests(selection).args(["--lib", "--bins"]))
        },
    },
    Step { part: Part::Chart, name: "chart", action: |_| chart::test() },
    // The tests start this command for their pods, and look for it beside the agent.
    Step { part: Part::Node, name: "programs", action: |_| programs() },
    Step {
        part: Part::Node,
        name: "node tests",
        action: |selection| run(tests(selection).args(["--test", "*"])),
    },
    Step {
        part: Part::Runtime,
        name: "container runtime",
        action: |selection| {
            programs()?;
            run(tests(selection).args(["--package", "kiam-agent", "--test", "runtime"]))
        },
    },
    Step {
        part: Part::Hostile,
        name: "hostile neighbours",
        action: |selection| {
            build::programs()?;
            run(tests(selection)
                .args(["--package", "kiam-agent", "--test", "hostile"])
                .args(["--", "--nocapture"]))
        },
    },
    Step {
        part: Part::Dashboards,
        name: "dashboards",
        action: |selection| {
            programs()?;
            let mut tests = tests(selection);
            tests.env("KIAM_TEST_ALERTS", "1").args(["--package", "kiam-agent"]);
            tests.args(["--test", "dashboards", "--", "--test-threads=1"]);
            run(&mut tests)
        },
    },
    Step {
        part: Part::Clients,
        name: "clients",
        action: |selection| lab::clients(selection.no_skip),
    },
    Step {
        part: Part::KernelLoad,
        name: "kernels load",
        action: |selection| kernels::load(selection.no_skip),
    },
    Step {
        part: Part::Sdks,
        name: "many clients",
        action: |selection| lab::sdks(selection.no_skip),
    },
    Step { part: Part::Image, name: "image", action: |_| image::test::run_tests() },
    Step { part: Part::Policies, name: "policies", action: |_| kubernetes::test_policies() },
    Step { part: Part::Apiserver, name: "real API server", action: |_| kubernetes::test_agent() },
    Step { part: Part::NodeVm, name: "whole node", action: |_| lab::node_vm() },
    Step { part: Part::Cluster, name: "Kubernetes cluster", action: |_| lab::cluster() },
    Step {
        part: Part::Kernels,
        name: "other kernels",
        action: |selection| kernels::test(&selection.kernels),
    },
];

#[derive(Debug, PartialEq)]
enum Outcome {
    Passed(Duration),
    Failed(Duration),
    NotRun,
}

/// Runs the steps of the chosen parts in order, up to the first that fails.
pub(crate) fn run_steps(selection: &Selection) -> Result<()> {
    toolchain::ensure_iproute()?;
    let chosen = |part| match selection.parts.as_slice() {
        [] => !matches!(
            part,
            Part::Sdks
                | Part::Image
                | Part::Policies
                | Part::Apiserver
                | Part::NodeVm
                | Part::Cluster
                | Part::Kernels
                | Part::Runtime
                | Part::Hostile
                | Part::Dashboards
        ),
        parts => parts.contains(&part),
    };
    let kernel = Step { part: Part::Checks, name: "kernel program", action: |_| build::ebpf() };
    let steps = std::iter::once(&kernel).chain(STEPS.iter().filter(|step| chosen(step.part)));
    let mut table = Vec::new();
    let mut failure = None;
    for step in steps {
        if failure.is_some() {
            table.push((step.name, Outcome::NotRun));
            continue;
        }
        say(format!("=== {} ===", step.name));
        let started = Instant::now();
        let result = (step.action)(selection);
        let took = started.elapsed();
        table.push(match result {
            Ok(()) => (step.name, Outcome::Passed(took)),
            Err(error) => {
                failure =
                    Some(anyhow!("{error:#}\nto repeat it: {}", repeat(step, selection.no_skip)));
                (step.name, Outcome::Failed(took))
            }
        });
    }
    eprint!("{}", summary(&table));
    failure.map_or(Ok(()), Err)
}

fn repeat(step: &Step, no_skip: bool) -> String {
    let strict = if no_skip { " --no-skip" } else { "" };
    match step.name {
        "kernel program" => "cargo xtask build-ebpf".to_owned(),
        "tidy" => "cargo xtask tidy".to_owned(),
        _ => format!("cargo xtask test{strict} {}", step.part),
    }
}

fn summary(table: &[(&str, Outcome)]) -> String {
    let mut text = format!("\n{:<18} {:<8} {:>7}\n", "step", "result", "seconds");
    for (name, outcome) in table {
        let (result, seconds) = match outcome {
            Outcome::Passed(took) => ("passed", format!("{:.1}", took.as_secs_f64())),
            Outcome::Failed(took) => ("FAILED", format!("{:.1}", took.as_secs_f64())),
            Outcome::NotRun => ("not run", String::new()),
        };
        text.push_str(format!("{name:<18} {result:<8} {seconds:>7}").trim_end());
        text.push('\n');
    }
    text
}

fn cargo(subcommand: &str) -> Command {
    let mut cargo = command("cargo");
    cargo.arg(subcommand);
    cargo
}

fn lints() -> Command {
    let mut lints = cargo("clippy");
    lints.args(["--all-targets", "--", "-D", "warnings"]);
    lints
}

fn tests(selection: &Selection) -> Command {
    let mut tests = cargo("test");
    if selection.no_skip {
        tests.env("KIAM_TEST_NO_SKIP", "1");
    }
    tests
}

/// What the tests of the agent as a process start.
fn programs() -> Result<()> {
    toolchain::ensure_container_runtime();
    toolchain::ensure_packet_filters();
    Prometheus::ensure();
    build::programs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_shows_every_step_with_its_time() {
        let table = [
            ("format", Outcome::Passed(Duration::from_millis(1240))),
            ("tidy", Outcome::Failed(Duration::from_millis(300))),
            ("lints", Outcome::NotRun),
        ];
        let wanted = "\nstep               result   seconds\n\
                      format             passed       1.2\n\
                      tidy               FAILED       0.3\n\
                      lints              not run\n";
        assert_eq!(summary(&table), wanted);
    }

    #[test]
    fn failure_names_the_command_that_repeats_the_part() {
        let node = STEPS.iter().find(|step| step.name == "node tests").unwrap();
        assert_eq!(repeat(node, true), "cargo xtask test --no-skip node");
    }
}

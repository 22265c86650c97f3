//! The lab's command: the demo, the benchmarks, the tests with real clients, and what runs inside the lab's pods.
//! `cargo xtask` starts it.

#![forbid(unsafe_code)]

mod bench;
mod clients;
mod cluster;
mod image;
mod node_vm;
mod sdks;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Parser;
use lab::{demo, pod_client};

/// Runs a Kubernetes node made of network namespaces and cgroups.
#[derive(Debug, Parser)]
#[command(name = "lab")]
enum Command {
    /// Shows the agent at work; needs root.
    Demo(demo::Options),
    /// Measures the agent beside what else could be there, and writes what it found; needs root.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Runs real AWS clients against the agent; needs root.
    Clients {
        /// Clients that can't run here are a failure.
        #[arg(long)]
        no_skip: bool,
    },
    /// Runs the agent's image; needs root.
    Image(image::Options),
    /// Installs many more AWS clients, old and new, and runs them against the agent; needs root.
    Sdks {
        /// Clients that can't run here are a failure.
        #[arg(long)]
        no_skip: bool,
    },
    /// Runs a whole node on another kernel, with the agent on it; needs root.
    NodeVm {
        /// What `xtask/node-vm/build.sh` made.
        node: PathBuf,
    },
    /// Runs on that node.
    #[command(hide = true)]
    InNodeVm,
    /// Runs the agent in a Kubernetes cluster with a node on another kernel; needs root.
    Cluster(cluster::Parts),
    /// Runs in that cluster's namespaces.
    #[command(hide = true)]
    InCluster {
        #[command(flatten)]
        parts: cluster::Parts,
        /// What a run writes goes there.
        folder: PathBuf,
    },
    /// Runs inside a pod: asks as an SDK does.
    #[command(hide = true)]
    InPod(pod_client::Options),
    /// Runs inside a hostile pod.
    #[command(hide = true)]
    InPodAttack,
    /// Runs inside a pod that others attack.
    #[command(hide = true)]
    InPodVictim {
        /// A [`pod_client::victim::Pace`] as JSON.
        pace: String,
    },
    /// Runs inside a pod that attacks others.
    #[command(hide = true)]
    InPodHostile {
        /// A [`pod_client::hostile::Program`] as JSON.
        program: String,
    },
    /// Runs inside a pod to be timed.
    #[command(hide = true)]
    InPodBench(pod_client::bench::Options),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Demo(options) => show(options),
        Command::Bench(bench) => bench::run(&bench),
        Command::Clients { no_skip } => clients::run(no_skip),
        Command::Image(options) => image::run(&options),
        Command::Sdks { no_skip } => sdks::run(no_skip),
        Command::NodeVm { node } => node_vm::run(&node),
        Command::InNodeVm => node_vm::in_guest(),
        Command::Cluster(parts) => cluster::run(&parts),
        Command::InCluster { parts, folder } => cluster::inside(&parts, &folder),
        Command::InPod(options) => pod_client::main(&options),
        Command::InPodAttack => pod_client::attack::main(),
        Command::InPodVictim { pace } => pod_client::victim::main(&pace),
        Command::InPodHostile { program } => pod_client::hostile::main(&program),
        Command::InPodBench(options) => pod_client::bench::main(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(options: demo::Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("building a runtime")?.block_on(demo::run(options))
}

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
    /// Shows the agent at work. Needs root, or `--rootless`.
    Demo(demo::Options),
    /// Compares the agent with its alternatives, and writes the results. Needs root.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Runs real AWS clients against the agent. Needs root.
    Clients {
        /// Fail if a client can't run here.
        #[arg(long)]
        no_skip: bool,
    },
    /// Runs the agent's image. Needs root.
    Image(image::Options),
    /// Installs many more AWS clients, old and new, and runs them against the agent. Needs root.
    Sdks {
        /// Fail if a client can't run here.
        #[arg(long)]
        no_skip: bool,
    },
    /// Runs the agent on a whole node with another kernel. Needs root.
    NodeVm {
        /// The node that `xtask/node-vm/build.sh` made.
        node: PathBuf,
    },
    /// Runs on that node.
    #[command(hide = true)]
    InNodeVm,
    /// Runs the agent in a Kubernetes cluster with a node on another kernel. Needs root.
    Cluster(cluster::Parts),
    /// Runs in that cluster's namespaces.
    #[command(hide = true)]
    InCluster {
        #[command(flatten)]
        parts: cluster::Parts,
        /// The folder that a run writes to.
        folder: PathBuf,
    },
    /// Runs inside a pod.
    #[command(hide = true, subcommand)]
    PodClient(pod_client::PodTask),
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
        Command::PodClient(client) => client.run(),
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

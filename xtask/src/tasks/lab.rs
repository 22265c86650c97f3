//! `cargo xtask demo`, `bench`, `test clients`, `test sdks`, `test node-vm` and `test cluster`: builds the agent and the lab, and lets the
//! lab do the rest.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::kubernetes::{cluster_programs, tool};
use xtask::{
    build,
    command::{command, run},
    toolchain,
};

/// Builds what the demo shows, and shows it.
pub(crate) fn demo(options: &[String]) -> Result<()> {
    if options.iter().any(|option| option == "--rootless") {
        build::rootless_demo()?;
    } else if !asks_for_help(options) {
        toolchain::ensure_iproute()?;
        build::ebpf()?;
        build::demo()?;
    }
    lab("demo", options)
}

/// Measures, and writes down what was found.
pub(crate) fn bench(options: &[String]) -> Result<()> {
    if !asks_for_help(options) {
        toolchain::ensure_iproute()?;
        build::ebpf()?;
        build::programs()?;
    }
    lab("bench", options)
}

/// Runs real AWS clients against the agent.
pub(crate) fn clients(no_skip: bool) -> Result<()> {
    build::programs()?;
    let strict = no_skip.then(|| "--no-skip".to_owned());
    lab("clients", strict.as_slice())
}

/// Runs many more, which the lab installs.
pub(crate) fn sdks(no_skip: bool) -> Result<()> {
    build::programs()?;
    let strict = no_skip.then(|| "--no-skip".to_owned());
    lab("sdks", strict.as_slice())
}

/// Has a whole node on another kernel, with the agent on it.
pub(crate) fn node_vm() -> Result<()> {
    let node = node()?;
    build::programs()?;
    lab("node-vm", &[node.display().to_string()])
}

/// Has a Kubernetes cluster with such a node.
pub(crate) fn cluster() -> Result<()> {
    let node = node()?;
    let programs = cluster_programs()?;
    build::programs()?;
    lab("cluster", &[programs, node].map(|folder| folder.display().to_string()))
}

/// What such a node is made of.
fn node() -> Result<PathBuf> {
    ensure!(
        cfg!(target_arch = "x86_64") && Path::new("/usr/bin/apt-get").exists(),
        "the node is made on x86_64 Debian only: its packages come by apt"
    );
    ensure!(rustix::process::geteuid().is_root(), "root is needed to lay the node's disk out");
    tool("node-vm", "xtask/node-vm/build.sh", &[], "1.5 GB and some minutes")
}

/// Whether only the lab's help is asked for, which needs neither kernel program nor agent.
fn asks_for_help(options: &[String]) -> bool {
    options.iter().any(|option| matches!(option.as_str(), "-h" | "--help" | "help"))
}

fn lab(subcommand: &str, options: &[String]) -> Result<()> {
    // Beside this command, wherever cargo's target folder is.
    let lab = std::env::current_exe()?.with_file_name("lab");
    if !lab.exists() {
        build::lab()?;
    }
    run(command(lab).arg(subcommand).args(options))
}

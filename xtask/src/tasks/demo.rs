//! `cargo xtask demo`: builds everything, then shows the agent at work.

use anyhow::{Context, Result, bail};
use xtask::{demo, lab};

use super::{build, toolchain};

/// Builds what the demo shows, and shows it.
pub(crate) fn run(options: demo::Options) -> Result<()> {
    toolchain::ensure_iproute()?;
    if let Err(reason) = lab::available() {
        bail!(
            "nothing was built or shown: the demo's node is made of network namespaces and cgroups, which this \
             machine refuses: {reason}\nwithout root, `cargo xtask test unit` is what can be run"
        );
    }
    build::ebpf()?;
    build::programs()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    runtime.context("building a runtime")?.block_on(demo::run(options))
}

//! Compiles the kernel program, and the programs of the workspace.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::command::{self, command, say, workspace};
use super::toolchain::{self, Route, Toolchain};

const OBJECT: &str = "kiam-ebpf/out/kiam.bpf.o";

/// Compiles the kernel program and puts the object where `kiam-agent` embeds it from; touches the object only if it is another one, so that the agent is not built anew.
pub(crate) fn ebpf() -> Result<()> {
    let toolchain = toolchain::ensure()?;
    say(format!("building the kernel program with {}", toolchain.route));
    command::run(&mut build(&toolchain))?;
    let built = workspace().join("target/bpf/bpfel-unknown-none/bpf/kiam-ebpf");
    let object = workspace().join(OBJECT);
    let changed = copy_if_changed(&built, &object)?;
    say(format!("{OBJECT} {}", if changed { "is new" } else { "is up to date" }));
    Ok(())
}

/// Machines are little-endian wherever kiam runs (x86_64, aarch64), so the object is `bpfel` for all of them.
fn build(toolchain: &Toolchain) -> Command {
    let mut build = command("cargo");
    let flags =
        format!("-C linker={} -C link-arg=--btf -C debuginfo=2", toolchain.linker.display());
    match toolchain.route {
        // aya-ebpf uses `asm_experimental_arch`, which a stable compiler takes only with this variable.
        Route::Debian => build.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", toolchain::DEBIAN_RUSTC),
        Route::Nightly => build.arg("+nightly"),
    };
    build.arg("build").args(["--profile", "bpf", "--target", "bpfel-unknown-none"]);
    build.args(["--package", "kiam-ebpf", "--target-dir", "target/bpf"]);
    if toolchain.route == Route::Nightly {
        build.args(["-Z", "build-std=core"]);
    }
    build.env("RUSTFLAGS", flags);
    build
}

/// Lints the kernel program as if it were for this machine: no toolchain has both clippy and `core` for BPF, and what
/// clippy looks at is the same.
pub(crate) fn ebpf_lints() -> Command {
    let mut lints = command("cargo");
    lints.env("RUSTC_BOOTSTRAP", "1");
    lints.args([
        "clippy",
        "--profile",
        "bpf",
        "--package",
        "kiam-ebpf",
        "--target-dir",
        "target/bpf",
    ]);
    lints.args(["--", "-D", "warnings"]);
    lints
}

/// Compiles the agent and this command, the latter for the lab's pods. All members at once, so that features are what
/// `cargo test` has too, and nothing is compiled twice.
pub(crate) fn programs() -> Result<()> {
    command::run(command("cargo").args(["build", "--bins"]))
}

fn copy_if_changed(from: &Path, to: &Path) -> Result<bool> {
    let new = fs::read(from).with_context(|| format!("no kernel program at {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(false);
    }
    let folder = to.parent().expect("the object is in a folder");
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(true)
}

//! `cargo xtask test image`: the image is built in two checkouts whose paths differ, compared, and run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use xtask::{
    build,
    command::{command, output_of, run, say, workspace},
    toolchain,
};

use super::emptied;
use crate::tasks::kernels::{Architecture, Debian};

/// What the size of the archive for one processor must stay below, in bytes.
const LIMIT: u64 = 15_000_000;
/// Two checkouts, in paths of different lengths.
const CHECKOUTS: [&str; 2] = ["one", "another/in/a/longer/path"];

/// Builds HEAD's image twice, compares, and runs it.
pub(crate) fn run_tests() -> Result<()> {
    toolchain::ensure_container_runtime();
    build::programs()?;
    let folder = emptied(workspace().join("target/tools/image"))?;
    let outputs = CHECKOUTS.map(|name| build_in(&folder.join(name)));
    let [first, second] = outputs;
    let (first, second) = (first?, second?);
    compare(&first, &second)?;
    for name in ["amd64", "arm64"] {
        let archive = archive(&first, name)?;
        let size = fs::metadata(&archive).context("reading the archive")?.len();
        ensure!(size < LIMIT, "{} has {size} bytes, more than {LIMIT}", archive.display());
    }
    let lab = std::env::current_exe()?.with_file_name("lab");
    let mut lab = command(lab);
    lab.arg("image").arg(archive(&first, "amd64")?).arg(first.join("root-amd64"));
    lab.args(["--version", env!("CARGO_PKG_VERSION")]);
    let debian = Debian::open(&workspace().join("target/tools/kernels"))?;
    lab.arg("--emulator").arg(debian.qemu_user(Architecture::Arm64)?);
    lab.arg("--emulated").arg(first.join("root-arm64"));
    run(&mut lab)?;
    fs::remove_dir_all(&folder).context("removing the checkouts")
}

/// The folder of an image that a checkout of its own has built, with nothing of ours but the commit.
fn build_in(folder: &Path) -> Result<PathBuf> {
    run(command("git").args(["clone", "--quiet", "--no-hardlinks", "."]).arg(folder))?;
    let mut image = command("cargo");
    // A target folder that all share would have the second checkout run the first one's command, in the first one.
    image.env_remove("CARGO_TARGET_DIR");
    image.current_dir(folder).args(["run", "--quiet", "--package", "xtask", "--", "image"]);
    run(&mut image)?;
    Ok(folder.join("target/image"))
}

/// Fails with the names of the files that differ.
fn compare(first: &Path, second: &Path) -> Result<()> {
    let mut diff: Command = command("diff");
    diff.args(["--recursive", "--brief"]).args([first, second]);
    let output = diff.output().context("starting diff")?;
    if !output.status.success() {
        let differences = String::from_utf8_lossy(&output.stdout);
        bail!("two builds of one commit differ:\n{differences}");
    }
    let files = output_of(command("find").arg(first).args(["-type", "f"])).unwrap_or_default();
    ensure!(!files.is_empty(), "{} has no files", first.display());
    say(format!("{} files of two builds are the same", files.lines().count()));
    Ok(())
}

fn archive(output: &Path, architecture: &str) -> Result<PathBuf> {
    let path = output.join(format!("kiam-agent-{}-{architecture}.tar", env!("CARGO_PKG_VERSION")));
    ensure!(path.exists(), "there is no {}", path.display());
    Ok(path)
}

//! `cargo xtask test kernels`: the kernel programs on kernels that this machine does not run.
//!
//! Debian's cloud kernels boot in QEMU, by emulation, with the agent's own test of loading as their only work. Nothing is
//! installed: packages come by apt from Debian's suites and are unpacked in `target/tools/kernels`.

mod debian;
mod guest;
mod initramfs;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

pub(crate) use self::guest::init;
use self::{
    debian::{Debian, Kernel, Series},
    guest::{Machine, Outcome},
};
use xtask::{
    build,
    command::{command, output_of, say, workspace},
};

/// The oldest kernel that the agent supports, two that many nodes run, and the newest there is.
const SERIES: [Series; 4] =
    [Series::Named(5, 10), Series::Named(6, 1), Series::Named(6, 12), Series::Newest];

/// How long a guest may take, which needs a tenth of that alone on a processor.
const LIMIT: Duration = Duration::from_secs(420);
/// Guests at a time: one takes a processor and 1 GB.
const AT_A_TIME: usize = 2;

/// Before what a guest reports, on a line of its own; kiam-agent's test `programs` writes it too.
const MARK: &str = "kiam-kernels:";

/// Boots each kernel, and writes what its guest reported to `docs/kernels.md`.
pub(crate) fn test() -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64") && Path::new("/usr/bin/apt-get").exists(),
        "kernels are booted on x86_64 Debian only: their packages come by apt"
    );
    let folder = workspace().join("target/tools/kernels");
    let debian = Debian::open(&folder)?;
    let machine = Machine { qemu: debian.qemu()?, logs: folder.join("logs") };
    let kernels =
        SERIES.map(|series| debian.kernel(series)).into_iter().collect::<Result<Vec<_>>>()?;
    build::programs()?;
    let probe = probe()?;
    let mut outcomes = Vec::new();
    for some in kernels.chunks(AT_A_TIME) {
        outcomes.extend(at_once(some, |kernel| run(&machine, kernel, &probe)));
    }
    let outcomes = outcomes.into_iter().collect::<Result<Vec<_>>>()?;
    let table = report::table(&outcomes);
    eprintln!("\n{table}");
    report::write(&workspace().join("docs/kernels.md"), &table)?;
    let failed: Vec<String> = outcomes.into_iter().flat_map(|outcome| outcome.failures).collect();
    if !failed.is_empty() {
        bail!("{}\nthe guests' logs are in {}", failed.join("\n"), machine.logs.display());
    }
    Ok(())
}

/// Does `work` with all of them at the same time.
fn at_once<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let running: Vec<_> = all.iter().map(|one| scope.spawn(|| work(one))).collect();
        running
            .into_iter()
            .map(|one| one.join().expect("a guest's thread does not panic"))
            .collect()
    })
}

fn run(machine: &Machine, kernel: &Kernel, probe: &Path) -> Result<Outcome> {
    let image = initramfs::build(kernel, probe)?;
    say(format!("booting {}", kernel.name));
    machine.boot(kernel, image.path(), LIMIT)
}

/// The agent's test of loading, as a program.
fn probe() -> Result<PathBuf> {
    let mut build = command("cargo");
    build.args(["test", "--no-run", "--package", "kiam-agent", "--test", "programs"]);
    let messages =
        output_of(build.args(["--message-format", "json"]).stderr(std::process::Stdio::inherit()))
            .context("the test of loading does not compile")?;
    let executable = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let wanted = message["target"]["name"] == "programs";
        message["executable"].as_str().filter(|_| wanted).map(PathBuf::from)
    };
    messages.lines().find_map(executable).context("cargo names no program of the test of loading")
}

/// An empty folder at `path`, whatever was there.
fn fresh(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))
}

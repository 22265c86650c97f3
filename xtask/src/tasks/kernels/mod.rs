//! `cargo xtask test kernels`: the kernel programs, the agent and its tests on kernels that this machine does not run.
//!
//! Debian's cloud kernels boot in QEMU, by emulation, with tests as their only work. Kernels, QEMU and what another
//! architecture needs come by apt from Debian's suites and are unpacked in `target/tools/kernels`.

mod architecture;
mod check;
mod debian;
mod guest;
mod initramfs;
mod inside;
mod job;
mod programs;
mod report;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

pub(crate) use self::{
    architecture::Architecture,
    debian::Debian,
    inside::init,
    programs::{compiler_for_arm64, cross},
};
use self::{
    check::{Check, Place},
    debian::Kernel,
    guest::{Guest, Machine},
    job::Report,
    programs::Programs,
    report::Results,
};
use xtask::command::{say, workspace};

/// Guests at a time: one takes a processor or two, and up to 3 GB.
const AT_A_TIME: usize = 2;

/// What guests do, and on which kernels.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// With `kernels`: what guests do. The others are `demo` and `tests`, which takes long by emulation
    #[arg(long, value_enum, value_delimiter = ',', default_value = "load,agent")]
    checks: Vec<Check>,
    /// With `kernels`: only those whose series or architecture this is, such as `5.10`, `newest` or `arm64`; the document keeps
    /// what others reported
    #[arg(long, value_name = "SERIES")]
    only: Option<String>,
    /// With `--checks tests`: only these of the agent's tests, such as `matrix,takeover`; the document keeps what
    /// others reported
    #[arg(long, value_name = "TESTS", value_delimiter = ',')]
    tests: Vec<String>,
}

/// What guests are made of.
struct Parts {
    machine: Machine,
    amd64: Option<Programs>,
    arm64: Option<Programs>,
}

// === impl Options ===

impl Options {
    /// The agent's tests that guests of that architecture run.
    fn tests(&self, architecture: Architecture) -> Vec<&'static str> {
        let is_there =
            |check: &&Check| check.places().iter().any(|place| place.architecture == architecture);
        let tests = self.checks.iter().filter(is_there).flat_map(|check| check.tests());
        tests.filter(|test| self.is_chosen(test)).collect()
    }

    /// The profile by which cargo compiles what guests run: what runs long is worth a build of its own.
    fn profile(&self) -> &'static str {
        if self.checks.contains(&Check::Tests) { "guest" } else { "dev" }
    }

    /// Whether `--tests` names it, or is of other tests, or is not given.
    fn is_chosen(&self, test: &str) -> bool {
        let named = |test: &str| self.tests.iter().any(|named| named == test);
        self.tests.is_empty() || named(test) || !Check::Tests.tests().contains(&test)
    }
}

/// A place with its kernel.
type Found = (Place, Kernel);

/// What comes by apt.
struct Downloads {
    folder: PathBuf,
    debian: Debian,
    found: Vec<Found>,
    machine: Machine,
}

// === impl Downloads ===

impl Downloads {
    fn get(options: &Options) -> Result<Self> {
        ensure!(
            cfg!(target_arch = "x86_64") && Path::new("/usr/bin/apt-get").exists(),
            "kernels are booted on x86_64 Debian only: their packages come by apt"
        );
        let folder = workspace().join("target/tools/kernels");
        let debian = Debian::open(&folder)?;
        let wanted = |place: &Place| options.only.as_ref().is_none_or(|only| place.is(only));
        let places = options.checks.iter().flat_map(|check| check.places()).filter(wanted);
        let kernel = |place: Place| Ok((place, debian.kernel(place.architecture, place.series)?));
        let found = places.map(kernel).collect::<Result<Vec<Found>>>()?;
        let machine = Machine { qemu: debian.qemu()?, logs: folder.join("logs") };
        Ok(Self { folder, debian, found, machine })
    }

    /// Whether any guest is of that architecture.
    fn has(&self, architecture: Architecture) -> bool {
        self.found.iter().any(|(place, _)| place.architecture == architecture)
    }
}

/// Boots each kernel, and writes what its guests reported to `docs/kernels.md`.
pub(crate) fn test(options: &Options) -> Result<()> {
    let all = run(options, Downloads::get(options)?)?;
    let are_all = options.only.is_none() && options.tests.is_empty();
    all.results.iter().try_for_each(|(check, results)| results.write(*check, are_all))?;
    all.verdict()
}

/// Loads the kernel programs on each kernel of this machine's architecture; the document stays as it is. Where the kernels can't
/// be had it says so, which `no_skip` makes a failure.
pub(crate) fn load(no_skip: bool) -> Result<()> {
    let only = Some(Architecture::Amd64.to_string());
    let options = Options { checks: vec![Check::Load], only, tests: Vec::new() };
    match Downloads::get(&options) {
        Ok(downloads) => run(&options, downloads)?.verdict(),
        Err(error) if no_skip => Err(error.context("other kernels can't be had")),
        Err(error) => {
            say(format!("skipped: other kernels can't be had: {error:#}"));
            Ok(())
        }
    }
}

/// What came of a run.
struct Outcome {
    results: Vec<(Check, Results)>,
    failures: Vec<String>,
    logs: PathBuf,
}

// === impl Outcome ===

impl Outcome {
    fn verdict(self) -> Result<()> {
        let Self { failures, logs, .. } = self;
        if !failures.is_empty() {
            bail!("{}\nthe guests' logs are in {}", failures.join("\n"), logs.display());
        }
        Ok(())
    }
}

fn run(options: &Options, downloads: Downloads) -> Result<Outcome> {
    let arm64 = downloads.has(Architecture::Arm64).then(|| {
        let tests = options.tests(Architecture::Arm64);
        Programs::arm64(&downloads.debian, &downloads.folder, &tests)
    });
    let amd64 = downloads
        .has(Architecture::Amd64)
        .then(|| Programs::here(&options.tests(Architecture::Amd64), options.profile()));
    let Downloads { found, machine, .. } = downloads;
    let parts = Parts { machine, amd64: amd64.transpose()?, arm64: arm64.transpose()? };
    let reports = at_once(&found, |found| boot(&parts, found));
    let reports = reports.into_iter().collect::<Result<Vec<_>>>()?;
    let results = options.checks.iter().map(|check| {
        let of_check = found.iter().zip(&reports).filter(|((place, _), _)| place.check == *check);
        let guests: Vec<_> =
            of_check.map(|((place, _), report)| (place.parameters, report)).collect();
        let results = Results::of(&guests);
        eprintln!("\n{check}\n\n{}", results.show());
        (*check, results)
    });
    Ok(Outcome {
        results: results.collect(),
        failures: reports.iter().flat_map(|report| report.failures.clone()).collect(),
        logs: parts.machine.logs,
    })
}

fn boot(parts: &Parts, (place, kernel): &Found) -> Result<Report> {
    let programs = match place.architecture {
        Architecture::Amd64 => parts.amd64.as_ref(),
        Architecture::Arm64 => parts.arm64.as_ref(),
    };
    let programs = programs.with_context(|| format!("{} has no programs", place.architecture))?;
    let jobs = place.jobs(&programs.paths)?;
    ensure!(!jobs.is_empty(), "--tests names none of the agent's tests that guests run");
    let needed = programs.paths.iter().filter(|(name, _)| place.check.needs(name));
    let needed: Vec<&Path> = needed.map(|(_, path)| path.as_path()).collect();
    let initramfs = programs.userland.archive(kernel, &needed, &jobs)?;
    let name = place.name(&kernel.name);
    say(format!("booting {name}"));
    let (processors, memory) = place.check.size();
    parts.machine.boot(&Guest {
        name,
        kernel,
        parameters: place.parameters,
        processors,
        memory,
        initramfs: initramfs.path(),
        init: programs.paths.get("xtask").context("cargo names no xtask")?,
        jobs: &jobs,
    })
}

/// Does `work` with all, some at a time, and in their order.
fn at_once<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(one) = all.get(number) else { return done };
            done.push((number, work(one)));
        }
    };
    let mut done: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(worker)).collect();
        let finished = workers.into_iter().map(|one| one.join());
        finished.flat_map(|done| done.expect("a guest's thread does not panic")).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, result)| result).collect()
}

/// An empty folder at `path`, whatever was there.
fn fresh(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))?;
    }
    fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))
}

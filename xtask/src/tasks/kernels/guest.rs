//! A guest: started and judged from outside, and what it does inside.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    mount::{MountFlags, mount},
    system::{RebootCommand, finit_module, reboot},
};
use tokio::time::Instant;

use super::{
    MARK,
    debian::{Kernel, Qemu},
    initramfs::{MODULES, PROBE},
};
use xtask::command::say;

/// Process 1 is told by it what it is.
const SUBCOMMAND: &str = "in-guest";
/// A guest's name for its kernel, and for its end.
const KERNEL: &str = "kernel";
const END: &str = "end";
const PASSED: &str = "passed";
/// Between two looks at whether QEMU has ended.
const STEP: Duration = Duration::from_millis(200);
/// One boot in fifty ends before process 1 begins.
const BOOTS: usize = 2;

/// What boots guests.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) qemu: Qemu,
    /// Where the guests' consoles are kept.
    pub(super) logs: PathBuf,
}

/// What a guest reported.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// As `uname -r` has it.
    pub(super) release: String,
    /// Debian's version of it.
    pub(super) version: String,
    /// By the name of a set of constants, what came of it.
    pub(super) sets: Vec<(String, String)>,
    /// The whole seconds that it took.
    pub(super) seconds: u64,
    /// Why the run fails, if it does.
    pub(super) failures: Vec<String>,
}

// === impl Machine ===

impl Machine {
    /// Boots `kernel` with `initramfs`, for `limit` at most.
    pub(super) fn boot(
        &self,
        kernel: &Kernel,
        initramfs: &Path,
        limit: Duration,
    ) -> Result<Outcome> {
        fs::create_dir_all(&self.logs).context("making the folder of the logs")?;
        let log = self.logs.join(format!("{}.log", kernel.name));
        for _ in 0..BOOTS {
            let started = Instant::now();
            self.run(kernel, initramfs, limit, &log)?;
            let console = fs::read(&log).context("reading a guest's console")?;
            let outcome = Outcome::read(&String::from_utf8_lossy(&console));
            if !outcome.release.is_empty() {
                return Ok(Outcome { seconds: started.elapsed().as_secs(), ..outcome });
            }
            say(format!("{} ended before its first process", kernel.name));
        }
        bail!("{} does not boot: see {}", kernel.name, log.display())
    }

    fn run(&self, kernel: &Kernel, initramfs: &Path, limit: Duration, log: &Path) -> Result<()> {
        let console = File::create(log).with_context(|| format!("making {}", log.display()))?;
        let errors = console.try_clone().context("sharing the log")?;
        let mut qemu = self.qemu.command();
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-machine", "q35", "-cpu", "max,la57=off", "-accel", "tcg"]);
        qemu.args(["-smp", "1", "-m", "1024", "-serial", "stdio"]);
        qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
        let parameters = format!("console=ttyS0 panic=-1 quiet no_timer_check -- {SUBCOMMAND}");
        qemu.arg("-append").arg(parameters);
        qemu.stdin(Stdio::null()).stdout(console).stderr(errors);
        let mut guest = qemu.spawn().context("starting QEMU")?;
        let deadline = Instant::now() + limit;
        // QEMU's own status says nothing: the console does.
        while guest.try_wait().context("asking for QEMU's status")?.is_none() {
            if Instant::now() > deadline {
                guest.kill().context("ending QEMU")?;
                guest.wait().context("waiting for QEMU's end")?;
                say(format!("{} was ended after {} s", kernel.name, limit.as_secs()));
                return Ok(());
            }
            thread::sleep(STEP);
        }
        Ok(())
    }
}

// === impl Outcome ===

impl Outcome {
    fn read(console: &str) -> Self {
        let mut outcome = Self::default();
        let mut passed = false;
        for line in console.lines() {
            let Some((name, rest)) =
                line.split_once(MARK).and_then(|(_, line)| line.trim().split_once(": "))
            else {
                continue;
            };
            match name {
                KERNEL => {
                    let (release, version) = rest.split_once(' ').unwrap_or((rest, ""));
                    outcome.release = release.to_owned();
                    outcome.version = debian_version(version).to_owned();
                }
                END => passed = rest == PASSED,
                name => outcome.sets.push((name.to_owned(), rest.to_owned())),
            }
        }
        let failed = outcome.sets.iter().filter(|(_, result)| result.starts_with("FAILED"));
        outcome.failures =
            failed.map(|(set, result)| format!("{}, {set}: {result}", outcome.release)).collect();
        if outcome.failures.is_empty() && (!passed || outcome.sets.is_empty()) {
            outcome.failures.push(format!("{}: the test did not come to its end", outcome.release));
        }
        outcome
    }
}

/// `#1 SMP Debian 5.10.262-1 (2026-01-01)` is version 5.10.262-1.
fn debian_version(text: &str) -> &str {
    let version = text.split_once("Debian ").and_then(|(_, rest)| rest.split(' ').next());
    version.unwrap_or_default()
}

// === inside ===

/// Process 1 of a guest: mounts what the test needs, loads the modules, runs the test, and turns the guest off.
pub(crate) fn init() -> Result<()> {
    ensure!(std::process::id() == 1, "this is for process 1 of a guest");
    let end = match prepare().and_then(|()| probe()) {
        Ok(()) => PASSED.to_owned(),
        Err(error) => format!("{error:#}"),
    };
    println!("{MARK} {END}: {end}");
    reboot(RebootCommand::PowerOff).context("turning the guest off")
}

fn prepare() -> Result<()> {
    let systems = [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("tmpfs", "/tmp"),
    ];
    for (kind, path) in systems {
        fs::create_dir_all(path).with_context(|| format!("making {path}"))?;
        mount(kind, path, kind, MountFlags::empty(), None)
            .with_context(|| format!("mounting {kind} on {path}"))?;
    }
    let kernel = |name| fs::read_to_string(format!("/proc/sys/kernel/{name}"));
    let (release, version) = (kernel("osrelease")?, kernel("version")?);
    println!("{MARK} {KERNEL}: {} {}", release.trim(), version.trim());
    let mut number = 1;
    while let Ok(module) = File::open(format!("{MODULES}/{number}.ko")) {
        finit_module(&module, c"", 0).with_context(|| format!("loading module {number}"))?;
        number += 1;
    }
    Ok(())
}

fn probe() -> Result<()> {
    let mut probe = Command::new(PROBE);
    probe.args(["--nocapture", "--test-threads", "1"]).env("PATH", "/bin");
    let status = probe.env("KIAM_TEST_NO_SKIP", "1").status().context("starting the test")?;
    ensure!(status.success(), "the test failed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "[    0.1] noise\r\nkiam-kernels: kernel: 5.10.0-46-cloud-amd64 #1 SMP Debian 5.10.262-1 (2026-01-01)\r\n";

    #[test]
    fn a_guest_passes_only_by_its_last_word() {
        let loaded = "test every ... kiam-kernels: defaults: loaded\r\n";
        let refused = "kiam-kernels: --path=node: FAILED: kernel 5.10 refuses kiam_uplink\r\n";
        let end = "kiam-kernels: end: passed\r\n";
        let cases = [
            (vec![HEAD, loaded, end], None),
            (vec![HEAD, loaded], Some("did not come to its end")),
            (vec![HEAD, end], Some("did not come to its end")),
            (vec![HEAD, loaded, refused, end], Some("refuses kiam_uplink")),
            (vec![HEAD, loaded, "kiam-kernels: end: the test failed\r\n"], Some("its end")),
        ];
        for (lines, failure) in cases {
            let outcome = Outcome::read(&lines.concat());
            assert_eq!(outcome.release, "5.10.0-46-cloud-amd64");
            assert_eq!(outcome.version, "5.10.262-1");
            let failures = outcome.failures;
            match failure {
                None => assert!(failures.is_empty(), "{failures:?}"),
                Some(part) => assert!(failures.concat().contains(part), "{failures:?}"),
            }
        }
    }
}

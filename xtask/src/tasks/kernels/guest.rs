//! A guest, started and judged from outside.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::time::Instant;

use super::{
    debian::{Kernel, Qemu},
    inside::SUBCOMMAND,
    job::{Job, Report},
};
use xtask::command::say;

/// Between two looks at whether QEMU has ended.
const STEP: Duration = Duration::from_millis(200);
/// What a boot may take, which needs a tenth of that alone on a processor.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long a second of a guest's clock may take, which needs a quarter of that alone on a processor.
const SLOWNESS: u32 = 20;
/// One boot in fifty ends before process 1 begins.
const BOOTS: usize = 2;

/// What boots guests.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) qemu: Qemu,
    /// Where the guests' consoles are kept.
    pub(super) logs: PathBuf,
}

/// What a guest is.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    /// What its log is called.
    pub(super) name: String,
    pub(super) kernel: &'a Kernel,
    /// For its kernel's command line.
    pub(super) parameters: &'a str,
    pub(super) processors: u32,
    /// In MiB.
    pub(super) memory: u32,
    pub(super) initramfs: &'a Path,
    /// Process 1, in the initramfs.
    pub(super) init: &'a Path,
    pub(super) jobs: &'a [Job],
}

// === impl Machine ===

impl Machine {
    /// Boots a guest; what its console said.
    pub(super) fn boot(&self, guest: &Guest<'_>) -> Result<Report> {
        fs::create_dir_all(&self.logs).context("making the folder of the logs")?;
        let log = self.logs.join(format!("{}.log", guest.name));
        for _ in 0..BOOTS {
            let started = Instant::now();
            self.run(guest, &log)?;
            let console = fs::read(&log).context("reading a guest's console")?;
            let report = Report::read(&String::from_utf8_lossy(&console), guest.jobs);
            if !report.release.is_empty() {
                say(format!("{} took {} s", guest.name, started.elapsed().as_secs()));
                return Ok(report);
            }
            say(format!("{} ended before its first process", guest.name));
        }
        bail!("{} does not boot: see {}", guest.name, log.display())
    }

    fn run(&self, guest: &Guest<'_>, log: &Path) -> Result<()> {
        let console = File::create(log).with_context(|| format!("making {}", log.display()))?;
        let errors = console.try_clone().context("sharing the log")?;
        let mut qemu = self.qemu.command(guest.kernel.architecture);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.args(["-accel", "tcg", "-serial", "stdio"]);
        // The guest's clock counts its instructions, and jumps where it has nothing to do: a busy machine does not make it late.
        qemu.args(["-icount", "shift=0,sleep=off", "-rtc", "clock=vm"]);
        qemu.arg("-smp").arg(guest.processors.to_string()).arg("-m").arg(guest.memory.to_string());
        qemu.arg("-kernel").arg(&guest.kernel.image).arg("-initrd").arg(guest.initramfs);
        let fixed = guest.kernel.architecture.parameters();
        let (init, further) = (guest.init.display(), guest.parameters);
        qemu.arg("-append").arg(format!("{fixed} rdinit={init} {further} -- {SUBCOMMAND}"));
        qemu.stdin(Stdio::null()).stdout(console).stderr(errors);
        let mut process = qemu.spawn().context("starting QEMU")?;
        let work: u64 = guest.jobs.iter().map(|job| job.seconds).sum();
        let limit = BOOT_LIMIT + Duration::from_secs(work) * SLOWNESS;
        let deadline = Instant::now() + limit;
        // QEMU's own status says nothing: the console does.
        while process.try_wait().context("asking for QEMU's status")?.is_none() {
            if Instant::now() > deadline {
                process.kill().context("ending QEMU")?;
                process.wait().context("waiting for QEMU's end")?;
                say(format!("{} was ended after {} s", guest.name, limit.as_secs()));
                return Ok(());
            }
            thread::sleep(STEP);
        }
        Ok(())
    }
}

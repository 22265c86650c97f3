//! What process 1 of a guest does.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::{
    mount::{MountFlags, mount},
    process::{Resource, Rlimit, setrlimit},
    system::{RebootCommand, finit_module, reboot},
};
use tokio::time::Instant;

use super::{
    check::{CONFIDENTIALITY, INTEGRITY, NO_BTF, NO_IPV6, NO_JIT},
    initramfs::{JOBS, MODULES},
    job::{BEGIN, DONE, END, Job, KERNEL, MARK, PASSED},
};

/// Process 1 is told by it what it is.
pub(super) const SUBCOMMAND: &str = "in-guest";
/// As many open files as Debian's systemd allows.
const FILES: u64 = 524_288;
const BTF: &str = "/sys/kernel/btf";
/// Between two looks at whether a job has ended.
const STEP: Duration = Duration::from_millis(50);

/// Mounts what the jobs need, loads the modules, runs the jobs, and turns the guest off.
pub(crate) fn init() -> Result<()> {
    ensure!(std::process::id() == 1, "this is for process 1 of a guest");
    let end = match prepare().and_then(|()| run_all()) {
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
        ("securityfs", "/sys/kernel/security"),
        ("devtmpfs", "/dev"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
    ];
    for (kind, path) in systems {
        fs::create_dir_all(path).with_context(|| format!("making {path}"))?;
        mount(kind, path, kind, MountFlags::empty(), None)
            .with_context(|| format!("mounting {kind} on {path}"))?;
    }
    // As systemd does, for a test that gives the agent next to no processor time.
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+cpu").context("enabling a controller")?;
    conditions(&fs::read_to_string("/proc/cmdline").context("reading the command line")?)?;
    let kernel = |name| fs::read_to_string(format!("/proc/sys/kernel/{name}"));
    let (release, version) = (kernel("osrelease")?, kernel("version")?);
    println!("{MARK} {KERNEL}: {} {}", release.trim(), version.trim());
    let limit = Rlimit { current: Some(FILES), maximum: Some(FILES) };
    setrlimit(Resource::Nofile, limit).context("raising the limit of open files")?;
    let mut number = 1;
    while let Ok(module) = File::open(format!("{MODULES}/{number}.ko")) {
        finit_module(&module, c"", 0).with_context(|| format!("loading module {number}"))?;
        number += 1;
    }
    let lo = Command::new("/bin/ip").args(["link", "set", "lo", "up"]).status();
    ensure!(lo.context("starting ip")?.success(), "loopback can't be set up");
    Ok(())
}

/// Makes what the command line asks for, and makes sure of what the kernel was to make of it.
fn conditions(line: &str) -> Result<()> {
    let asked = |parameter: &str| line.split_ascii_whitespace().any(|word| word == parameter);
    if asked(NO_BTF) && Path::new(BTF).exists() {
        mount("tmpfs", BTF, "tmpfs", MountFlags::empty(), None).context("hiding BTF")?;
    }
    let reads = |path: &str, part: &str| {
        fs::read_to_string(path).is_ok_and(|text| text.trim().contains(part))
    };
    let holds = [
        (NO_BTF, !Path::new(BTF).join("vmlinux").exists()),
        (NO_JIT, reads("/proc/sys/net/core/bpf_jit_enable", "0")),
        (NO_IPV6, !Path::new("/proc/sys/net/ipv6").exists()),
        (INTEGRITY, reads("/sys/kernel/security/lockdown", "[integrity]")),
        (CONFIDENTIALITY, reads("/sys/kernel/security/lockdown", "[confidentiality]")),
    ];
    for (parameter, holds) in holds {
        ensure!(holds || !asked(parameter), "{parameter} has no effect on this kernel");
    }
    Ok(())
}

fn run_all() -> Result<()> {
    let jobs = fs::read(JOBS).context("reading the jobs")?;
    let jobs: Vec<Job> = serde_json::from_slice(&jobs).context("reading the jobs")?;
    for job in jobs {
        println!("{MARK} {BEGIN}: {}", job.name);
        let status = run(&job)?;
        println!("\n{MARK} {DONE}: {}: {status}", job.name);
    }
    Ok(())
}

/// How the job ended.
fn run(job: &Job) -> Result<String> {
    let mut command = Command::new(&job.program);
    command.args(&job.arguments).env("PATH", "/bin").env("NO_COLOR", "1").env("HOME", "/tmp");
    command.env("KIAM_TEST_NO_SKIP", "1").current_dir(Path::new("/tmp"));
    command.envs(job.variable.clone());
    let mut child = command.spawn().with_context(|| format!("starting {}", job.name))?;
    let deadline = Instant::now() + Duration::from_secs(job.seconds);
    loop {
        match child.try_wait().context("waiting for a job")? {
            Some(status) if status.success() => return Ok(PASSED.to_owned()),
            Some(status) => return Ok(status.to_string()),
            None if Instant::now() > deadline => {
                child.kill().context("ending a job")?;
                child.wait().context("waiting for a job's end")?;
                return Ok(format!("ended after {} s", job.seconds));
            }
            None => thread::sleep(STEP),
        }
    }
}

//! A process that goes on until it is ended, and what it writes.

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::Instant;

const POLL: Duration = Duration::from_millis(10);
/// How long threads may take to stop.
const STOPPING: Duration = Duration::from_secs(10);
/// How long a polite end may take.
const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// The process. Drop kills it; in a panicking test its output is printed first.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    exited: Option<ExitStatus>,
}

// === impl Process ===

impl Process {
    /// Starts `command`; what it prints goes to the end of the file `log`.
    pub fn start(name: &'static str, command: &mut Command, log: PathBuf) -> Result<Self> {
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        command.stderr(output.try_clone().context("sharing the log")?);
        let child = command.stdin(Stdio::null()).stdout(output).spawn();
        let child = child.with_context(|| format!("starting {name}"))?;
        Ok(Self { name, child, log, exited: None })
    }

    /// Waits until it `has` done `what`, such as "listened"; how long that took.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut has: impl FnMut(&Self) -> bool,
    ) -> Result<Duration> {
        let (name, started) = (self.name, Instant::now());
        while !has(self) {
            if let Some(status) = self.status()? {
                bail!("{name} ended with {status}; it said:\n{}", self.log());
            }
            if started.elapsed() > limit {
                bail!("{name} has not {what} after {limit:?}; it said:\n{}", self.log());
            }
            thread::sleep(POLL);
        }
        Ok(started.elapsed())
    }

    /// Waits until its log says `text`.
    pub fn wait_said(&mut self, text: &str, limit: Duration) -> Result<Duration> {
        self.wait(&format!("said {text:?}"), limit, |process| process.said(text))
    }

    /// Whether its log says `text`.
    #[must_use]
    pub fn said(&self, text: &str) -> bool {
        self.log().contains(text)
    }

    /// Everything it has written.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| format!("(no log: {error})"),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// The file that has its log.
    #[must_use]
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// An amount of memory in bytes, such as `VmRSS`, what it has, and `VmHWM`, the most that it has had at once.
    pub fn memory(&self, field: &str) -> Result<u64> {
        let status = self.read("status")?;
        let amount = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kib = amount.and_then(|amount| amount.trim().strip_suffix(" kB"));
        let kib = kib.with_context(|| format!("{} has no {field}", self.name))?;
        Ok(kib.parse::<u64>().context("an amount of memory")? * 1024)
    }

    /// How long processors have worked for it, which what else the machine does hardly changes.
    pub fn cpu_time(&self) -> Result<Duration> {
        /// `USER_HZ`, in which the kernel counts for programs, whatever its own clock is.
        const TICKS_PER_SECOND: u32 = 100;
        let stat = self.read("stat")?;
        // The name before it may have spaces.
        let (_, after_name) = stat.rsplit_once(") ").context("a process has a name")?;
        let ticks = after_name.split(' ').skip(11).take(2).map(str::parse::<u64>);
        let ticks: u64 = ticks.sum::<Result<_, _>>().context("a process has times")?;
        Ok(Duration::from_secs(ticks) / TICKS_PER_SECOND)
    }

    /// How long processors have run its threads, to the nanosecond, without those that have ended.
    pub fn run_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/task", self.pid());
        let mut all = 0;
        for task in fs::read_dir(&path).with_context(|| format!("reading {path}"))? {
            let file = task.context("a thread")?.path().join("schedstat");
            // It may have ended meanwhile.
            let Ok(text) = fs::read_to_string(file) else { continue };
            let nanos = text.split(' ').next().context("a thread has a run time")?;
            all += nanos.trim().parse::<u64>().context("a run time")?;
        }
        Ok(Duration::from_nanos(all))
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> Result<usize> {
        let path = format!("/proc/{}/fd", self.pid());
        Ok(fs::read_dir(&path).with_context(|| format!("reading {path}"))?.count())
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.pid());
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    }

    /// `kill -9`, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        let name = self.name;
        if let Some(status) = self.status()? {
            bail!("{name} had ended already with {status}; it said:\n{}", self.log());
        }
        self.child.kill().with_context(|| format!("killing {name}"))?;
        let status = self.child.wait().with_context(|| format!("waiting for {name}"))?;
        self.exited = Some(status);
        if status.signal() != Some(Signal::KILL.as_raw()) {
            bail!("{name} ended with {status} before it was killed; it said:\n{}", self.log());
        }
        Ok(())
    }

    /// Asks it to end (SIGTERM) and returns how it did.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if self.status()?.is_none() {
            self.signal(Signal::TERM)?;
        }
        self.wait_end(EXIT_LIMIT)
    }

    /// Waits until it has ended by itself, and returns how it did.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if started.elapsed() > limit {
                bail!("{} has not ended after {limit:?}; it said:\n{}", self.name, self.log());
            }
            thread::sleep(POLL);
        }
    }

    /// Makes it hang (SIGSTOP): its sockets stay open and nothing answers. Returns when all its threads have stopped, which
    /// the kernel does one by one.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)?;
        let begun = Instant::now();
        while !self.is_frozen()? {
            ensure!(begun.elapsed() < STOPPING, "{} does not stop", self.name);
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn is_frozen(&self) -> Result<bool> {
        let threads = format!("/proc/{}/task", self.child.id());
        for task in fs::read_dir(&threads).with_context(|| format!("reading {threads}"))? {
            // A thread that has ended since does nothing any more.
            let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
            // The state follows the name in brackets: proc_pid_stat(5).
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if !matches!(state, None | Some('T' | 'Z' | 'X')) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Lets it go on (SIGCONT).
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let sent = kill_process(Pid::from_child(&self.child), signal);
        sent.with_context(|| format!("signalling {}", self.name))
    }

    /// How it ended, if it has.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.exited.is_none() {
            let status = self.child.try_wait();
            self.exited = status.with_context(|| format!("asking after {}", self.name))?;
        }
        Ok(self.exited)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let name = self.name;
        if thread::panicking() {
            eprintln!("--- the output of {name}\n{}---", self.log());
        }
        if self.exited.is_none()
            && let Err(error) = self.child.kill().and_then(|()| self.child.wait())
        {
            eprintln!("lab: {name} can't be killed: {error}");
        }
    }
}

//! What `/proc` says about a process that connected, for the audit.
//!
//! The kernel programs record the process's number, its thread's name and the time at connect. The rest is read later, so that
//! the process may have ended, or its number may be another's. A folder of `/proc` that is open never leads to another process,
//! and one that started after the connect is another one. In doubt nothing is said of it.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags, open, openat, readlinkat},
    io::Errno,
};

use crate::{intercept::start_time, sys::since_boot};
use kiam_core::{
    blocking::Blocking,
    pods::{CallingProcess, Executable, Inspection, Relative},
};

/// The inode of the initial PID namespace (`PROC_PID_INIT_INO`), in which the kernel programs number processes.
const INITIAL_PIDS: u64 = 0xEFFF_FFFC;
/// The most bytes that are read of a file in `/proc`.
const MAX_READ: u64 = 16 * 1024;
/// The most parents that are climbed on the way to a container's first process.
const PARENTS: usize = 32;

/// A reader of `/proc`.
#[derive(Debug)]
pub struct ProcessReader {
    /// Whether the agent sees processes by the numbers that the kernel programs have.
    sees_all: bool,
}

/// Since when a process's container runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContainerAge {
    /// The first process of its PID namespace, which is an ancestor, has run for so long.
    Of(Duration),
    /// The process was started from outside, as by `kubectl exec`.
    Entered,
    /// Not known: the process has ended, or the container shares the node's PID namespace.
    Unknown,
}

/// A process by its open folder in `/proc`.
struct Process {
    pid: u32,
    folder: File,
    stat: Stat,
}

/// What `/proc/<pid>/stat` has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stat {
    comm: Vec<u8>,
    parent: u32,
    started: Duration,
}

// === impl ProcessReader ===

impl ProcessReader {
    /// A reader for the agent's own PID namespace.
    #[must_use]
    pub fn new() -> Self {
        let own = fs::metadata("/proc/self/ns/pid");
        Self { sees_all: own.is_ok_and(|namespace| namespace.ino() == INITIAL_PIDS) }
    }

    /// Whether the agent sees processes by the numbers that the kernel programs have. It needs `hostPID`, on a node that is not
    /// itself a container.
    #[must_use]
    pub fn sees_all(&self) -> bool {
        self.sees_all
    }

    /// Reads what is known of `caller`. The program is read first: the process may be about to end.
    #[must_use]
    pub fn inspect(&self, _: &Blocking, caller: &CallingProcess) -> Inspection {
        let nothing = |executable| Inspection { executable, parent: None };
        if !self.sees_all {
            return nothing(Executable::Unreadable);
        }
        let Some(folder) = folder_of(caller.pid) else { return nothing(Executable::Gone) };
        let executable = readlinkat(&folder, "exe", Vec::new());
        let Some(process) = Process::of(caller.pid, folder).filter(|it| it.connected(caller))
        else {
            return nothing(Executable::Gone);
        };
        let executable = match executable {
            Ok(path) if process.has_thread_named_otherwise(caller) => {
                Executable::Changed(path.into_bytes())
            }
            Ok(path) => Executable::Running(path.into_bytes()),
            Err(Errno::ACCESS | Errno::PERM) => Executable::Unreadable,
            Err(_) => Executable::Gone,
        };
        Inspection { executable, parent: process.parent().map(|parent| parent.described()) }
    }

    /// Since when the container of `caller` runs.
    #[must_use]
    pub fn container_age(&self, _: &Blocking, caller: &CallingProcess) -> ContainerAge {
        if !self.sees_all {
            return ContainerAge::Unknown;
        }
        let found = folder_of(caller.pid).and_then(|folder| Process::of(caller.pid, folder));
        let Some(mut process) = found.filter(|it| it.connected(caller)) else {
            return ContainerAge::Unknown;
        };
        for climbed in 0..PARENTS {
            match *process.numbers() {
                // Of the node's own namespace: the process itself, or one outside of the container.
                [_] if climbed == 0 => return ContainerAge::Unknown,
                [_] => return ContainerAge::Entered,
                // Deeper ones are the container's own.
                [_, 1] => {
                    return ContainerAge::Of(since_boot().saturating_sub(process.stat.started));
                }
                [] => return ContainerAge::Unknown,
                _ => {}
            }
            match process.parent() {
                Some(parent) => process = parent,
                None if process.stat.parent == 0 => return ContainerAge::Entered,
                None => return ContainerAge::Unknown,
            }
        }
        ContainerAge::Unknown
    }
}

impl Default for ProcessReader {
    fn default() -> Self {
        Self::new()
    }
}

// === impl Process ===

impl Process {
    /// The process of an open folder; `None` once it has ended.
    fn of(pid: u32, folder: File) -> Option<Self> {
        let stat = Stat::parse(&read(&folder, "stat").ok()?)?;
        Some(Self { pid, folder, stat })
    }

    /// Whether this is the process that connected. Its number can't have come round within the tick that start times have: the
    /// kernel would have to start as many processes in 10 ms as there are numbers.
    fn connected(&self, caller: &CallingProcess) -> bool {
        self.stat.started <= caller.connected
    }

    /// Whether the thread that connected has another name now. One that has ended has no name.
    fn has_thread_named_otherwise(&self, caller: &CallingProcess) -> bool {
        let now = read(&self.folder, &format!("task/{}/comm", caller.thread));
        now.is_ok_and(|now| now.strip_suffix(b"\n").unwrap_or(&now) != caller.comm.as_bytes())
    }

    /// The parent. A process that started later has only its number.
    fn parent(&self) -> Option<Self> {
        let folder = (self.stat.parent != 0).then(|| folder_of(self.stat.parent)).flatten()?;
        let parent = Self::of(self.stat.parent, folder)?;
        (parent.stat.started <= self.stat.started).then_some(parent)
    }

    fn described(&self) -> Relative {
        Relative {
            pid: self.pid,
            comm: self.stat.comm.clone(),
            executable: readlinkat(&self.folder, "exe", Vec::new()).ok().map(|it| it.into_bytes()),
            is_first: self.numbers().last() == Some(&1),
        }
    }

    /// Its numbers in the initial PID namespace and in those below; none once it has ended.
    fn numbers(&self) -> Vec<u32> {
        let status = read(&self.folder, "status").unwrap_or_default();
        let lines = status.split(|byte| *byte == b'\n');
        let numbers = lines.filter_map(|line| line.strip_prefix(b"NSpid:")).next();
        let text = String::from_utf8_lossy(numbers.unwrap_or_default());
        text.split_ascii_whitespace().filter_map(|number| number.parse().ok()).collect()
    }
}

// === impl Stat ===

impl Stat {
    /// The second field is the process's name in parentheses, which may have any bytes.
    fn parse(text: &[u8]) -> Option<Self> {
        let open = text.iter().position(|byte| *byte == b'(')?;
        let close = text.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(text.get(close..)?).ok()?;
        let parent = rest.split_ascii_whitespace().nth(2)?.parse().ok()?;
        let comm = text.get(open + 1..close)?.to_vec();
        Some(Self { comm, parent, started: start_time(rest)? })
    }
}

/// The open folder of the process `pid`; `None` if there is none.
fn folder_of(pid: u32) -> Option<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path: PathBuf = Path::new("/proc").join(pid.to_string());
    open(path, flags, Mode::empty()).ok().map(File::from)
}

fn read(folder: &File, name: &str) -> io::Result<Vec<u8>> {
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut text = Vec::new();
    File::from(file).take(MAX_READ).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::ffi::OsStringExt as _,
        process::{Child, Command, Stdio},
        thread,
    };

    use super::*;
    use kiam_core::pods::Comm;

    /// A process that ends with the test.
    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let mut command = Command::new("sleep");
            Self(command.arg("1000").stdin(Stdio::null()).spawn().unwrap())
        }

        /// The process, as if it had connected at `connected`.
        fn calls(&self, comm: &str, connected: Duration) -> CallingProcess {
            let pid = self.0.id();
            CallingProcess { pid, thread: pid, connected, comm: named(comm) }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn named(comm: &str) -> Comm {
        let mut bytes = [0; 16];
        bytes[..comm.len()].copy_from_slice(comm.as_bytes());
        Comm::new(bytes)
    }

    fn inspect(caller: &CallingProcess) -> Inspection {
        ProcessReader { sees_all: true }.inspect(&Blocking::here().unwrap(), caller)
    }

    #[test]
    fn the_program_and_the_parent_are_read() {
        let sleeper = Sleeper::start();
        let found = inspect(&sleeper.calls("sleep", since_boot()));
        let Executable::Running(path) = &found.executable else { panic!("{found:?}") };
        assert!(path.ends_with(b"sleep") || path.ends_with(b"coreutils"), "{found:?}");
        let parent = found.parent.unwrap();
        let own = std::env::current_exe().unwrap().into_os_string().into_vec();
        assert_eq!((parent.pid, parent.executable), (std::process::id(), Some(own)));
    }

    #[test]
    fn a_name_that_is_not_the_one_at_connect_is_a_change() {
        let sleeper = Sleeper::start();
        let found = inspect(&sleeper.calls("aws", since_boot()));
        assert!(matches!(found.executable, Executable::Changed(_)), "{found:?}");
    }

    #[test]
    fn a_process_that_started_after_the_connect_is_another_one() {
        let before = since_boot();
        thread::sleep(Duration::from_millis(20));
        let sleeper = Sleeper::start();
        let found = inspect(&sleeper.calls("sleep", before));
        assert_eq!(found, Inspection { executable: Executable::Gone, parent: None });
    }

    #[test]
    fn a_process_that_has_ended_is_gone_also_while_nobody_has_waited_for_it() {
        let mut child = Command::new("true").spawn().unwrap();
        let (pid, connected) = (child.id(), since_boot());
        let caller = CallingProcess { pid, thread: pid, connected, comm: named("true") };
        let is_zombie = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit_once(')').unwrap().1.starts_with(" Z")
        };
        while !is_zombie() {
            thread::yield_now();
        }
        assert_eq!(inspect(&caller).executable, Executable::Gone);
        child.wait().unwrap();
        assert_eq!(inspect(&caller).executable, Executable::Gone);
    }

    #[test]
    fn numbers_of_another_pid_namespace_say_nothing() {
        let sleeper = Sleeper::start();
        let (reader, blocking) = (ProcessReader { sees_all: false }, Blocking::here().unwrap());
        let caller = sleeper.calls("sleep", since_boot());
        assert_eq!(reader.inspect(&blocking, &caller).executable, Executable::Unreadable);
        assert_eq!(reader.container_age(&blocking, &caller), ContainerAge::Unknown);
    }

    #[test]
    fn any_name_is_read_and_changes_nothing_else() {
        let rest = " S 42 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4211 9 10";
        for name in [&b"a) S 1 2 3"[..], b"\xff\x1b[2J", b"", b"((("] {
            let text = [b"7 (", name, b")", rest.as_bytes()].concat();
            let started = Duration::from_millis(42_110);
            let expected = Stat { comm: name.to_vec(), parent: 42, started };
            assert_eq!(Stat::parse(&text), Some(expected));
        }
        assert_eq!(Stat::parse(b"7 (a) S 1"), None);
    }
}

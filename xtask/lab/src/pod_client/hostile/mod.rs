//! What a hostile pod does beside others (`lab pod-client hostile`): one [`Program`], at full speed until its stdin ends.
//! It prints a line when it is in full swing and a [`Report`] at its end. Everything is bounded: what is opened by a
//! number, what is repeated by [`LIMIT`].

mod cgroups;
mod deferred;
mod flood;
mod forge;
mod hold;
mod namespaces;
mod pipeline;
mod reuse;
pub mod spoof;

use std::{
    collections::BTreeMap,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use super::{attack::sys::mark, raise_file_limit};
use crate::IMDS_V4;

/// No program goes on for longer.
const LIMIT: Duration = Duration::from_secs(600);

/// What a hostile pod does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub enum Program {
    /// Writes many requests at once, on many connections, again and again.
    Pipeline {
        connections: u32,
        /// How many requests a write has.
        burst: u32,
        reads: bool,
    },
    /// Holds connections, and opens a new one for each that ends.
    Hold { to: SocketAddr, connections: u32, sends: Sends },
    /// Opens and closes connections as fast as it can.
    Churn {
        threads: u32,
        /// By a socket that is bound to this interface, which takes the node's path.
        interface: Option<String>,
    },
    /// Sends requests as fast as they are answered.
    Flood {
        threads: u32,
        /// Which.
        asks: Asks,
    },
    /// Connects to the metadata service, disconnects, and connects the same sockets to a port that the agent has
    /// elsewhere.
    Reuse {
        sockets: u32,
        /// The port that the node's listener has. Inside a pod, the program finds it out.
        node_port: u16,
    },
    /// Sees a connection of another pod on the node's network begin, and opens one with the same ends from a namespace
    /// of its own.
    Forge { listener: (Ipv4Addr, u16), threads: u32 },
    /// Opens connections from a namespace of its own, from another pod's address and all the ports that it may use.
    Spray {
        source: Ipv4Addr,
        /// The first and the last of its ports.
        ports: (u16, u16),
        listener: (Ipv4Addr, u16),
        /// How many are open at a time.
        window: u32,
    },
    /// Keeps two sockets ready for each port that a connection of another pod on the node's network may have, and has both
    /// send their SYNs when such a connection begins.
    Defer {
        listener: (Ipv4Addr, u16),
        /// The first and the last of the ports.
        ports: (u16, u16),
        /// Interfaces of the node, none of which is its loopback.
        interfaces: [String; 2],
    },
    /// Makes empty cgroups in its container's.
    Cgroups { below: PathBuf, count: u32 },
    /// Changes its container's `cgroup.events` again and again, as far as the kernel tells who watches it.
    CgroupEvents { cgroup: PathBuf },
    /// Pings the metadata service without a pause.
    Ping,
    /// Says by ARP that it is the others, to two stations of its link.
    Spoof {
        /// The two: each is told that this process has the address of the other.
        stations: [spoof::Station; 2],
        /// The MAC of its own interface.
        own: String,
    },
    /// Makes network namespaces, and connects to the metadata service once from each.
    Namespaces { count: u32, listener: (Ipv4Addr, u16) },
}

/// What is sent on a connection that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sends {
    /// Nothing.
    Nothing,
    /// A request's head, a byte every 100 ms.
    SlowHead,
    /// Requests without end. No answer is read.
    Requests,
}

/// What is asked for in a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asks {
    /// Session tokens.
    Tokens,
    /// Paths that are refused, each another one, and roles that are not its own.
    Refused,
    /// As an SDK does, on a new connection for each request, which the server is asked to close.
    Reconnecting,
}

/// What a program did, by what it is called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report(pub BTreeMap<String, u64>);

/// The course of a program: when it ends, and what it did.
#[derive(Debug, Default)]
struct Course {
    ended: AtomicBool,
    report: Mutex<Report>,
}

/// Runs the program until stdin ends, and prints what it did.
pub fn main(program: &str) -> Result<()> {
    let program: Program = serde_json::from_str(program).context("reading the program")?;
    raise_file_limit()?;
    let course = Course::default();
    thread::scope(|scope| {
        let running = scope.spawn(|| program.run(&course));
        scope.spawn(|| course.end_at_limit());
        // That stdin can't be read is its end too.
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        course.ended.store(true, Ordering::Relaxed);
        running.join().expect("no program panics")
    })?;
    let report = course.report.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{}", serde_json::to_string(&report).context("a report")?);
    Ok(())
}

// === impl Program ===

impl Program {
    fn run(&self, course: &Course) -> io::Result<()> {
        match self {
            Self::Pipeline { connections, burst, reads } => {
                pipeline::run(course, *connections, *burst, *reads)
            }
            Self::Hold { to, connections, sends } => hold::run(course, *to, *connections, *sends),
            Self::Churn { threads, interface } => {
                flood::churn(course, *threads, interface.as_deref())
            }
            Self::Flood { threads, asks } => flood::run(course, *threads, *asks),
            Self::Reuse { sockets, node_port } => reuse::run(course, *sockets, *node_port),
            Self::Forge { listener, threads } => {
                forge::by_sight(course, (*listener).into(), *threads)
            }
            Self::Spray { source, ports, listener, window } => {
                let ports = ports.0..=ports.1;
                forge::by_guess(course, *source, ports, (*listener).into(), *window)
            }
            Self::Defer { listener, ports, interfaces } => {
                deferred::run(course, (*listener).into(), ports.0..=ports.1, interfaces)
            }
            Self::Cgroups { below, count } => cgroups::run(course, below, *count),
            Self::CgroupEvents { cgroup } => cgroups::stir(course, cgroup),
            Self::Ping => flood::ping(course),
            Self::Spoof { stations, own } => spoof::run(course, stations, own),
            Self::Namespaces { count, listener } => {
                namespaces::storm(course, *count, (*listener).into())
            }
        }
    }
}

// === impl Course ===

impl Course {
    fn goes_on(&self) -> bool {
        !self.ended.load(Ordering::Relaxed)
    }

    /// Says that the program is in full swing.
    fn in_full_swing(&self) {
        let mut stdout = io::stdout().lock();
        // Who does not listen has ended it.
        let _ = stdout.write_all(b"in full swing\n").and_then(|()| stdout.flush());
    }

    fn count(&self, what: &str, count: u64) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        *report.0.entry(what.to_owned()).or_default() += count;
    }

    /// Runs `work` on so many threads.
    fn on_threads(&self, threads: u32, work: impl Fn() + Sync) {
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(&work);
            }
        });
    }

    fn end_at_limit(&self) {
        let started = Instant::now();
        while self.goes_on() && started.elapsed() < LIMIT {
            thread::sleep(Duration::from_millis(50));
        }
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// The metadata service.
fn imds() -> SocketAddr {
    (IpAddr::from(IMDS_V4), 80).into()
}

/// A stream socket whose packets are marked as an attacker's, and whose end is one packet.
fn socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    mark(&socket)?;
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(socket)
}

/// Connects it without waiting.
fn begin_connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(()),
    }
}

/// Whether a call on a non-blocking socket has to be repeated later.
fn is_later(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOTCONN | libc::EINPROGRESS))
}

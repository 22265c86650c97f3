//! What runs inside a lab pod (`lab pod-client`): it asks the metadata service as an SDK does, or attacks, and says what
//! came of it.

pub mod attack;
pub mod bench;
pub mod hostile;
mod options;
mod tally;
mod unrelated;
pub mod victim;
pub mod wire;

pub use options::{Imds, Options, Via};
pub use tally::Tally;

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with, sockopt},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use serde::{Deserialize, Serialize};
use socket2::{SockFilter, SockRef};
use tokio::time::Instant;

const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";
const TTL: u32 = 21600;

/// What a process in a pod does.
#[derive(Debug, clap::Subcommand)]
pub enum PodTask {
    /// Asks as an SDK does.
    Ask(Options),
    /// Does what the lines of stdin order, as a hostile process would.
    Attack,
    /// Asks at a steady pace, while others attack.
    Victim {
        /// A [`victim::Pace`] as JSON.
        pace: String,
    },
    /// Attacks others until stdin ends.
    Hostile {
        /// A [`hostile::Program`] as JSON.
        program: String,
    },
    /// Asks to be timed.
    Bench(bench::Options),
    /// Does nothing that concerns the agent, again and again.
    Unrelated {
        /// How often.
        rounds: u32,
    },
}

/// What came of one attempt.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Attempt {
    /// The last step taken: `connect`, `token`, `list`, `get`.
    pub step: String,
    /// What ended it early, such as `ECONNREFUSED`.
    pub error: Option<String>,
    /// The status of the last answer.
    pub status: Option<u16>,
    /// Its headers, by lower-case name.
    pub headers: BTreeMap<String, String>,
    /// Its body.
    pub body: String,
    /// The role's name, as the service listed it.
    pub role: Option<String>,
    /// From before the connect to after the last answer.
    pub micros: u64,
}

// === impl PodTask ===

impl PodTask {
    /// Does it.
    pub fn run(&self) -> Result<()> {
        match self {
            Self::Ask(options) => ask_and_print(options),
            Self::Attack => attack::main(),
            Self::Victim { pace } => victim::main(pace),
            Self::Hostile { program } => hostile::main(program),
            Self::Bench(options) => bench::main(options),
            Self::Unrelated { rounds } => unrelated::main(*rounds),
        }
    }
}

/// Asks as `options` say and prints an [`Attempt`] a line.
fn ask_and_print(options: &Options) -> Result<()> {
    if let Some(threads) = options.threads {
        return tally::main(options, threads);
    }
    let started = Instant::now();
    let ended = Arc::new(AtomicBool::new(!options.until_eof));
    if options.until_eof {
        let ended = Arc::clone(&ended);
        thread::spawn(move || {
            // An error ends it too.
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            ended.store(true, Ordering::SeqCst);
        });
    }
    let mut stdout = io::stdout().lock();
    let mut done = 0;
    loop {
        // Before the attempt, so that one is made after the end.
        let ends = ended.load(Ordering::SeqCst);
        serde_json::to_writer(&mut stdout, &attempt(options)).context("printing an attempt")?;
        stdout.write_all(b"\n").context("printing an attempt")?;
        done += 1;
        let is_early = |limit| started.elapsed() < Duration::from_millis(limit);
        if ends && done >= options.repeat && !options.for_ms.is_some_and(is_early) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(options.pause_ms));
    }
}

/// Asks once.
#[must_use]
pub fn attempt(options: &Options) -> Attempt {
    let started = Instant::now();
    let mut attempt = Attempt::default();
    if let Err(error) = ask(options, &mut attempt) {
        attempt.error = Some(name(&error));
    }
    attempt.micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    attempt
}

// === impl Attempt ===

impl Attempt {
    /// A text field of the body, when that is JSON, such as `AccessKeyId`.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<String> {
        let body: serde_json::Value = serde_json::from_str(&self.body).ok()?;
        Some(body.get(name)?.as_str()?.to_owned())
    }

    /// Why the agent rejected it, as it told; empty if it did not.
    #[must_use]
    pub fn reason(&self) -> &str {
        wire::reason(&self.headers)
    }
}

fn ask(options: &Options, attempt: &mut Attempt) -> io::Result<()> {
    attempt.step = "connect".to_owned();
    if options.via == Via::Udp {
        return datagram(options);
    }
    if options.only_connect {
        return open(options).map(drop);
    }
    converse(options, attempt, &mut || open(options))
}

/// Asks as an SDK does, on a stream that `open` connects.
fn converse<S: Read + Write>(
    options: &Options,
    attempt: &mut Attempt,
    open: &mut dyn FnMut() -> io::Result<S>,
) -> io::Result<()> {
    let mut stream = open()?;
    let mut token = String::new();
    if options.imds == Imds::V2 {
        let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {TTL}\r\nContent-Length: 0\r\n");
        let request = options.request("PUT", "/latest/api/token", &ttl);
        if !step(attempt, "token", open, &mut stream, &request)? {
            return Ok(());
        }
        token = format!("X-aws-ec2-metadata-token: {}\r\n", attempt.body);
    }
    if let Some(path) = &options.path {
        let request = options.request(&options.method, path, &token);
        return step(attempt, "get", open, &mut stream, &request).map(drop);
    }
    let request = options.request("GET", CREDENTIALS, &token);
    if !step(attempt, "list", open, &mut stream, &request)? {
        return Ok(());
    }
    let role = attempt.body.clone();
    let request = options.request("GET", &format!("{CREDENTIALS}{role}"), &token);
    attempt.role = Some(role);
    step(attempt, "get", open, &mut stream, &request).map(drop)
}

/// Sends one request, on a new connection where the answer before said that the old one ends; `false` when the
/// answer is not 200, which ends the attempt.
fn step<S: Read + Write>(
    attempt: &mut Attempt,
    name: &str,
    open: &mut dyn FnMut() -> io::Result<S>,
    stream: &mut S,
    request: &str,
) -> io::Result<bool> {
    attempt.step = name.to_owned();
    if attempt.headers.get("connection").is_some_and(|value| value == "close") {
        *stream = open()?;
    }
    let reply = wire::exchange(stream, request)?;
    attempt.status = Some(reply.status);
    attempt.headers = reply.headers;
    attempt.body = reply.body;
    Ok(reply.status == 200)
}

fn open(options: &Options) -> io::Result<TcpStream> {
    let destination = options.destination();
    let socket = socket(destination)?;
    if let Some(interface) = &options.interface {
        SockRef::from(&socket).bind_device(Some(interface.as_bytes()))?;
    }
    if let Some(size) = options.filter {
        SockRef::from(&socket).attach_filter(&filter(size))?;
    }
    if let Some(source) = options.bind {
        bind(&socket, &SocketAddr::new(source, 0))?;
    }
    // Limits connect(2) too, which then fails with EINPROGRESS.
    for way in [sockopt::Timeout::Send, sockopt::Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, way, Some(options.timeout()))?;
    }
    connect(&socket, &destination)?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn socket(destination: SocketAddr) -> io::Result<OwnedFd> {
    let family = if destination.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?)
}

/// A filter that accepts all by its first instruction; see [`Options::filter`].
fn filter(size: u16) -> Vec<SockFilter> {
    let instruction = |code, k| SockFilter::new(code, 0, 0, k);
    let accept = || instruction((libc::BPF_RET | libc::BPF_K) as u16, u32::MAX);
    let long = || instruction((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0);
    let short = || instruction((libc::BPF_ALU | libc::BPF_ADD | libc::BPF_K) as u16, 1);
    let longs = std::iter::repeat_with(long).take((size / 32).into());
    let shorts = std::iter::repeat_with(short).take((size % 32).into());
    std::iter::once(accept()).chain(longs).chain(shorts).chain([accept()]).collect()
}

fn datagram(options: &Options) -> io::Result<()> {
    let destination = options.destination();
    let any =
        if destination.is_ipv4() { IpAddr::from([0; 4]) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((options.bind.unwrap_or(any), 0))?;
    socket.send_to(b"kiam-lab", destination).map(drop)
}

/// Lets this process open as many files as it may.
fn raise_file_limit() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
        .context("raising the limit of open files")
}

/// The name by which errno(3) knows it.
fn name(error: &io::Error) -> String {
    let known = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "ECONNREFUSED",
        Some(libc::ECONNRESET) => "ECONNRESET",
        Some(libc::EPERM) => "EPERM",
        Some(libc::EACCES) => "EACCES",
        Some(libc::ENETUNREACH) => "ENETUNREACH",
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH",
        Some(libc::EPIPE) => "EPIPE",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(libc::ECONNABORTED) => "ECONNABORTED",
        // What traffic control drops.
        Some(libc::ENOBUFS) => "ENOBUFS",
        Some(libc::ETIMEDOUT | libc::EINPROGRESS | libc::EAGAIN) => "ETIMEDOUT",
        Some(_) => return error.to_string(),
        None if error.kind() == io::ErrorKind::UnexpectedEof => "EOF",
        None if error.kind() == io::ErrorKind::TimedOut => "ETIMEDOUT",
        None => return error.to_string(),
    };
    known.to_owned()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_closed_port_is_econnrefused() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let to = Some(IpAddr::from([127, 0, 0, 1]));
        let attempt = attempt(&Options { to, port, ..Options::default() });
        assert_eq!(
            (attempt.step.as_str(), attempt.error.as_deref()),
            ("connect", Some("ECONNREFUSED"))
        );
    }
}

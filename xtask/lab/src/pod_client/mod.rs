//! What runs inside a lab pod (`lab in-pod`): asks the metadata service as an SDK does and says what came of it.

pub mod attack;
pub mod bench;
pub mod hostile;
mod tally;
pub mod victim;
pub mod wire;

pub use tally::Tally;

use std::{
    collections::BTreeMap,
    ffi::OsString,
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
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, connect, ipproto, socket_with, sockopt,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{IMDS_V4, IMDS_V6};

const CREDENTIALS: &str = "/latest/meta-data/iam/security-credentials/";
const TTL: u32 = 21600;

/// How to ask. Printed answers are [`Attempt`]s, one JSON line each.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What to GET; absent: what an SDK does, the role's name and then its credentials.
    pub path: Option<String>,
    /// The sort of socket and address.
    #[arg(long, value_enum, default_value_t)]
    pub via: Via,
    /// An address other than the metadata service's.
    #[arg(long)]
    pub to: Option<IpAddr>,
    /// The port.
    #[arg(long, default_value_t = 80)]
    pub port: u16,
    /// The source address to bind.
    #[arg(long)]
    pub bind: Option<IpAddr>,
    /// The protocol: version 2 gets a token first.
    #[arg(long, value_enum, default_value_t)]
    pub imds: Imds,
    /// The method.
    #[arg(long, default_value = "GET")]
    pub method: String,
    /// A further header, `Name: value`.
    #[arg(long = "header")]
    pub headers: Vec<String>,
    /// How many times to ask, each on a new connection.
    #[arg(long, default_value_t = 1)]
    pub repeat: u32,
    /// Ask again and again for so many milliseconds, and at least once.
    #[arg(long)]
    pub for_ms: Option<u64>,
    /// Ask again and again until stdin ends, and once more then.
    #[arg(long)]
    pub until_eof: bool,
    /// Ask from so many threads, `repeat` times each and on until stdin ends, and print one [`Tally`].
    #[arg(long)]
    pub threads: Option<u32>,
    /// The pause between two attempts in milliseconds.
    #[arg(long, default_value_t = 0)]
    pub pause_ms: u64,
    /// How long a step may take in milliseconds.
    #[arg(long, default_value_t = 5000)]
    pub timeout_ms: u64,
}

/// The sort of socket and address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Via {
    /// TCP to 169.254.169.254.
    #[default]
    V4,
    /// TCP to `::ffff:169.254.169.254` from an IPv6 socket, as dual-stack runtimes do.
    V4Mapped,
    /// TCP to `fd00:ec2::254`.
    V6,
    /// One UDP datagram to 169.254.169.254.
    Udp,
}

/// The version of the metadata protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Imds {
    /// Without a token.
    V1,
    /// With one.
    #[default]
    V2,
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

/// Asks as `options` say and prints an [`Attempt`] a line.
///
/// # Errors
///
/// Only when nothing can be printed: a failed attempt is an answer.
pub fn main(options: &Options) -> Result<()> {
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

// === impl Options ===

impl Default for Options {
    fn default() -> Self {
        Self {
            path: None,
            via: Via::V4,
            to: None,
            port: 80,
            bind: None,
            imds: Imds::V2,
            method: "GET".to_owned(),
            headers: Vec::new(),
            repeat: 1,
            for_ms: None,
            until_eof: false,
            threads: None,
            pause_ms: 0,
            timeout_ms: 5000,
        }
    }
}

impl Options {
    /// A GET of `path`.
    #[must_use]
    pub fn get(path: &str) -> Self {
        Self { path: Some(path.to_owned()), ..Self::default() }
    }

    /// The command line that says the same.
    #[must_use]
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<String> = self.path.iter().cloned().collect();
        let mut flag = |name: &str, value: String| args.push(format!("--{name}={value}"));
        flag("via", spelling(&self.via));
        flag("imds", spelling(&self.imds));
        flag("port", self.port.to_string());
        flag("method", self.method.clone());
        flag("repeat", self.repeat.to_string());
        flag("pause-ms", self.pause_ms.to_string());
        flag("timeout-ms", self.timeout_ms.to_string());
        self.to.iter().for_each(|to| flag("to", to.to_string()));
        self.bind.iter().for_each(|bind| flag("bind", bind.to_string()));
        self.headers.iter().for_each(|header| flag("header", header.clone()));
        self.for_ms.iter().for_each(|limit| flag("for-ms", limit.to_string()));
        self.threads.iter().for_each(|threads| flag("threads", threads.to_string()));
        args.extend(self.until_eof.then(|| "--until-eof".to_owned()));
        args.into_iter().map(OsString::from).collect()
    }

    fn destination(&self) -> SocketAddr {
        let standard = match self.via {
            Via::V4 | Via::V4Mapped | Via::Udp => IMDS_V4.into(),
            Via::V6 => IMDS_V6.into(),
        };
        let address = match (self.via, self.to.unwrap_or(standard)) {
            (Via::V4Mapped, IpAddr::V4(v4)) => v4.to_ipv6_mapped().into(),
            (_, address) => address,
        };
        (address, self.port).into()
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.max(1))
    }

    fn request(&self, method: &str, path: &str, further: &str) -> String {
        let own: String = self.headers.iter().map(|header| format!("{header}\r\n")).collect();
        format!(
            "{method} {path} HTTP/1.1\r\nHost: {IMDS_V4}\r\nUser-Agent: kiam-lab\r\n{further}{own}\r\n"
        )
    }
}

fn ask(options: &Options, attempt: &mut Attempt) -> io::Result<()> {
    attempt.step = "connect".to_owned();
    if options.via == Via::Udp {
        return datagram(options);
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

fn datagram(options: &Options) -> io::Result<()> {
    let destination = options.destination();
    let any =
        if destination.is_ipv4() { IpAddr::from([0; 4]) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((options.bind.unwrap_or(any), 0))?;
    socket.send_to(b"kiam-lab", destination).map(drop)
}

/// How clap wants the value on a command line.
fn spelling(value: &impl clap::ValueEnum) -> String {
    let value = value.to_possible_value().expect("no value is hidden");
    value.get_name().to_owned()
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

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn options_survive_their_command_line() {
        let options = Options {
            via: Via::V4Mapped,
            to: Some(IpAddr::from([127, 0, 0, 1])),
            imds: Imds::V1,
            headers: vec!["X-Forwarded-For: 10.0.0.1".to_owned()],
            for_ms: Some(5),
            until_eof: true,
            threads: Some(8),
            ..Options::get("/latest/")
        };
        let args = options.to_args();
        let line = std::iter::once("in-pod".into()).chain(args.clone());
        assert_eq!(Line::parse_from(line).options.to_args(), args);
        assert_eq!(options.destination(), "[::ffff:127.0.0.1]:80".parse().unwrap());
    }

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

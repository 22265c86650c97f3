//! What runs inside a lab pod to be timed (`lab pod-client bench`): one small request again and again, each by the clock.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::CREDENTIALS;
use crate::IMDS_V4;

/// How long one step of one request may take.
const STEP_LIMIT: Duration = Duration::from_secs(5);
/// How long all of them may take.
const LIMIT: Duration = Duration::from_secs(60);
/// Requests before the clock counts.
pub const WARM_UP: u32 = 20;

/// What to ask for, and how often: the list of roles, by IMDSv1.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to connect to.
    #[arg(long)]
    pub to: SocketAddr,
    /// The role that must be the answer.
    #[arg(long)]
    pub role: String,
    /// How many requests of each kind to time.
    #[arg(long)]
    pub requests: u32,
}

/// What the requests of one run took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// A connection for each request: from before `connect` to the end of the stream.
    pub fresh: Spread,
    /// All on one connection: from before the request is written to the last byte of its answer.
    pub kept: Spread,
}

/// How times lie, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spread {
    /// How many there are.
    pub count: u32,
    /// The shortest.
    pub min: u64,
    /// Half are not longer.
    pub p50: u64,
    /// Nine of ten are not longer.
    pub p90: u64,
    /// The longest.
    pub max: u64,
}

/// Asks as `options` say and prints what it took: a [`Measured`] as JSON.
pub fn main(options: &Options) -> Result<()> {
    let measured = measure(options).with_context(|| format!("asking {}", options.to))?;
    serde_json::to_writer(&mut io::stdout().lock(), &measured).context("printing")
}

fn measure(options: &Options) -> Result<Measured> {
    let started = Instant::now();
    let fresh = request("Connection: close\r\n");
    let fresh = timed(options, started, |answer| {
        let socket = socket(options.to)?;
        let before = Instant::now();
        connect(&socket, &options.to)?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(&fresh)?;
        stream.read_to_end(answer)?;
        Ok(before.elapsed())
    })?;
    let kept = request("");
    let socket = socket(options.to)?;
    connect(&socket, &options.to).context("connecting")?;
    let mut stream = TcpStream::from(socket);
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    let kept = timed(options, started, |answer| {
        let before = Instant::now();
        stream.write_all(&kept)?;
        read_answer(&mut stream, answer, &options.role)?;
        Ok(before.elapsed())
    })?;
    Ok(Measured { fresh, kept })
}

/// Asks by `ask`, which puts the answer into an empty buffer, and looks at each answer outside the time it took.
fn timed(
    options: &Options,
    started: Instant,
    mut ask: impl FnMut(&mut Vec<u8>) -> io::Result<Duration>,
) -> Result<Spread> {
    let mut answer = Vec::with_capacity(4096);
    let mut times = Vec::new();
    for number in 0..WARM_UP + options.requests {
        ensure!(started.elapsed() < LIMIT, "gave up after {number} requests and {LIMIT:?}");
        answer.clear();
        let took = ask(&mut answer).with_context(|| format!("request {number}"))?;
        ensure!(
            is_answer(&answer, &options.role),
            "request {number}: not role {:?} but {:?}",
            options.role,
            String::from_utf8_lossy(&answer)
        );
        if number >= WARM_UP {
            times.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
    }
    Spread::of(times).context("there is nothing to measure: --requests is 0")
}

fn request(further: &str) -> Vec<u8> {
    let head = format!("GET {CREDENTIALS} HTTP/1.1\r\nHost: {IMDS_V4}\r\n");
    format!("{head}User-Agent: kiam-lab\r\n{further}\r\n").into_bytes()
}

/// Reads up to the end of the answer, or up to what can't be one.
fn read_answer(stream: &mut impl Read, answer: &mut Vec<u8>, role: &str) -> io::Result<()> {
    let mut buffer = [0; 4096];
    while !is_answer(answer, role) {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        answer.extend_from_slice(&buffer[..length]);
    }
    Ok(())
}

/// Whether it is a 200 whose body is the role.
fn is_answer(answer: &[u8], role: &str) -> bool {
    let body = answer.strip_suffix(role.as_bytes());
    answer.starts_with(b"HTTP/1.1 200 ") && body.is_some_and(|head| head.ends_with(b"\r\n\r\n"))
}

fn socket(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP))?;
    for way in [sockopt::Timeout::Send, sockopt::Timeout::Recv] {
        sockopt::set_socket_timeout(&socket, way, Some(STEP_LIMIT))?;
    }
    Ok(socket)
}

// === impl Spread ===

impl Spread {
    /// That of `times`; `None` of none.
    #[must_use]
    pub fn of(mut times: Vec<u64>) -> Option<Self> {
        times.sort_unstable();
        // The nearest rank: the smallest that as many are not longer than.
        let rank = |percent: usize| (times.len() * percent).div_ceil(100).saturating_sub(1);
        Some(Self {
            count: u32::try_from(times.len()).ok()?,
            min: *times.first()?,
            p50: *times.get(rank(50))?,
            p90: *times.get(rank(90))?,
            max: *times.last()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    #[test]
    fn spread_is_by_nearest_rank() {
        let cases = [
            (vec![], None),
            (vec![7], Some((1, 7, 7, 7, 7))),
            ((1..=10).rev().collect(), Some((10, 1, 5, 9, 10))),
            (vec![4, 1, 3], Some((3, 1, 3, 4, 4))),
        ];
        for (times, wanted) in cases {
            let spread = Spread::of(times).map(|s: Spread| (s.count, s.min, s.p50, s.p90, s.max));
            assert_eq!(spread, wanted);
        }
    }

    /// Answers as many connections as `measure` makes, each request on it with `body`.
    fn serve(body: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0; 1024];
                while let Ok(length @ 1..) = stream.read(&mut request) {
                    let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n{body}");
                    stream.write_all(answer.as_bytes()).unwrap();
                    let text = String::from_utf8_lossy(&request[..length]).into_owned();
                    if text.contains("Connection: close") {
                        break;
                    }
                }
            }
        });
        address
    }

    #[test]
    fn requests_are_timed_and_a_wrong_answer_ends_it() {
        let options = |to| Options { to, role: "reader".to_owned(), requests: 5 };
        let measured = measure(&options(serve("reader"))).unwrap();
        for spread in [measured.fresh, measured.kept] {
            assert_eq!(spread.count, 5);
            assert!(0 < spread.min && spread.min <= spread.p50 && spread.p50 <= spread.max);
        }
        let error = measure(&options(serve("writer"))).unwrap_err();
        assert!(error.to_string().contains("request 0: not role \"reader\""), "{error:#}");
    }
}

//! What an honest pod does beside a hostile one (`lab pod-client victim`): it asks as an SDK does, at a steady pace, until its
//! stdin ends, and prints one [`VictimReport`].

use std::{
    collections::BTreeMap,
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::Instant;

use super::{CREDENTIALS, TTL, attack::sys::mark, name, wire};
use crate::IMDS_V4;

/// How an honest pod asks. A round is what an SDK does: a token, the role's name, the credentials.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Pace {
    /// From the start of a round to the start of the next, in milliseconds.
    pub round_ms: u64,
    /// Rounds on one connection.
    pub rounds_per_connection: u32,
    /// How long a step may take in milliseconds.
    pub timeout_ms: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VictimReport {
    /// Rounds that got credentials, by access key.
    pub keys: BTreeMap<String, u64>,
    /// Rounds that did not, by what ended them: `connect EPERM`, `list 403`.
    pub failures: BTreeMap<String, u64>,
    /// How long each request took, in microseconds and in ascending order. The first on a connection includes the
    /// connect.
    pub micros: Vec<u64>,
    /// Requests that were sent again, as a kept connection had ended before them.
    pub resent: u64,
}

/// Asks until stdin ends, and prints what came of it.
pub fn main(pace: &str) -> Result<()> {
    let pace: Pace = serde_json::from_str(pace).context("reading the pace")?;
    let ended = AtomicBool::new(false);
    let served = thread::scope(|scope| {
        let asking = scope.spawn(|| Victim::new(pace).ask(&ended));
        let read = io::copy(&mut io::stdin().lock(), &mut io::sink());
        ended.store(true, Ordering::Relaxed);
        let served = asking.join().expect("a request that fails is counted");
        read.map(|_| served)
    });
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, &served.context("reading stdin")?).context("printing")?;
    stdout.write_all(b"\n").context("printing")
}

#[derive(Debug)]
struct Victim {
    pace: Pace,
    served: VictimReport,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: Socket,
    requests: u32,
}

// === impl VictimReport ===

impl VictimReport {
    /// Rounds.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.keys.values().chain(self.failures.values()).sum()
    }

    /// The time that `percent` of the requests did not exceed.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.micros.len() * percent).div_ceil(100).saturating_sub(1);
        Duration::from_micros(self.micros.get(rank).copied().unwrap_or_default())
    }
}

// === impl Victim ===

impl Victim {
    fn new(pace: Pace) -> Self {
        Self { pace, served: VictimReport::default(), connection: None }
    }

    fn ask(mut self, ended: &AtomicBool) -> VictimReport {
        let period = Duration::from_millis(self.pace.round_ms);
        let mut rounds = 0;
        while !ended.load(Ordering::Relaxed) {
            let started = Instant::now();
            if rounds % self.pace.rounds_per_connection.max(1) == 0 {
                self.connection = None;
            }
            rounds += 1;
            let mut step = "connect";
            let counter = match self.round(&mut step) {
                Ok(key) => self.served.keys.entry(key),
                Err(what) => {
                    self.connection = None;
                    self.served.failures.entry(format!("{step} {what}"))
                }
            };
            *counter.or_default() += 1;
            thread::sleep(period.saturating_sub(started.elapsed()));
        }
        self.served.micros.sort_unstable();
        self.served
    }

    /// The access key, or what there was instead.
    fn round(&mut self, step: &mut &'static str) -> Result<String, String> {
        let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {TTL}\r\nContent-Length: 0\r\n");
        let token = self.request(step, "token", &request("PUT", "/latest/api/token", &ttl))?;
        let token = format!("X-aws-ec2-metadata-token: {token}\r\n");
        let role = self.request(step, "list", &request("GET", CREDENTIALS, &token))?;
        let path = format!("{CREDENTIALS}{role}");
        let body = self.request(step, "get", &request("GET", &path, &token))?;
        let body: serde_json::Value = serde_json::from_str(&body).map_err(|_| "no JSON")?;
        Ok(body["AccessKeyId"].as_str().ok_or("no key")?.to_owned())
    }

    /// The body of an answer that is 200.
    fn request(
        &mut self,
        step: &mut &'static str,
        next: &'static str,
        request: &str,
    ) -> Result<String, String> {
        let started = Instant::now();
        let reply = self.exchange(step, next, request);
        let took = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.served.micros.push(took);
        let reply = reply.map_err(|error| name(&error))?;
        if reply.headers.get("connection").is_some_and(|value| value == "close") {
            self.connection = None;
        }
        if reply.status == 200 { Ok(reply.body) } else { Err(reply.status.to_string()) }
    }

    /// Sends a request on the kept connection, and once more on a new one where that had ended, as HTTP clients do.
    fn exchange(
        &mut self,
        step: &mut &'static str,
        next: &'static str,
        request: &str,
    ) -> io::Result<wire::Reply> {
        if let Some(kept) = &mut self.connection {
            *step = next;
            match kept.exchange(request) {
                Err(error) if kept.requests > 1 && has_ended(&error) => self.served.resent += 1,
                answer => return answer,
            }
        }
        *step = "connect";
        let connection = self.connection.insert(Connection::open(self.pace.timeout_ms)?);
        *step = next;
        connection.exchange(request)
    }
}

// === impl Connection ===

impl Connection {
    fn open(timeout_ms: u64) -> io::Result<Self> {
        let stream = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        let timeout = Some(Duration::from_millis(timeout_ms.max(1)));
        stream.set_write_timeout(timeout)?;
        stream.set_read_timeout(timeout)?;
        // The packets of pods on the node's network are told from the agent's by this.
        mark(&stream)?;
        stream.connect(&SocketAddr::from((IpAddr::from(IMDS_V4), 80)).into())?;
        stream.set_tcp_nodelay(true)?;
        Ok(Self { stream, requests: 0 })
    }

    fn exchange(&mut self, request: &str) -> io::Result<wire::Reply> {
        self.requests += 1;
        wire::exchange(&mut self.stream, request)
    }
}

/// Whether the server has ended a kept connection.
fn has_ended(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn request(method: &str, path: &str, further: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: {IMDS_V4}\r\nUser-Agent: kiam-lab\r\n{further}\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let of = |micros: Vec<u64>, percent| {
            VictimReport { micros, ..VictimReport::default() }.percentile(percent)
        };
        assert_eq!(of(vec![], 99), Duration::ZERO);
        assert_eq!(of(vec![7], 50), Duration::from_micros(7));
        assert_eq!(of((1..=200).collect(), 99), Duration::from_micros(198));
    }
}

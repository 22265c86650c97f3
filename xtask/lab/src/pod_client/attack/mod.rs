//! What a hostile process in a pod tries (`lab pod-client attack`): it reads [`Order`]s, a JSON line each, and says of each
//! what came of it. Each family of attempts is a module; what is kept for later stays with the process.

pub mod datagram;
pub mod frame;
pub mod raw;
pub mod stream;

pub(super) mod bytes;
mod handover;
mod occupy;
pub(super) mod sys;

use std::{
    io::{self, BufRead, Write},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::Socket;
use tokio::time::Instant;

use self::{handover::Kept, occupy::Occupied, stream::Stream};
use super::{Attempt, Imds, Options, converse, name, raise_file_limit};

pub use occupy::SQUATTER_ACCESS_KEY;

/// The type of service of all IPv4 packets that attackers send. On the node's own network it tells them from the agent's,
/// which comes from the same address and may speak to the metadata service.
pub const TOS: u8 = 0x04;

/// One thing to try.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// What.
    pub attack: Attack,
    /// How long a step may take in milliseconds.
    pub timeout_ms: u64,
}

/// What to try.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub enum Attack {
    /// Connects a stream, and asks for credentials on it.
    Stream { way: stream::Way, to: SocketAddr, from: Option<SocketAddr> },
    /// Sends a datagram.
    Datagram { way: datagram::Way, to: SocketAddr },
    /// Sends by a raw IP socket.
    Raw {
        way: raw::Way,
        /// The source that the packet names.
        from: IpAddr,
        to: IpAddr,
    },
    /// Sends by a packet socket.
    Frame {
        way: frame::Way,
        /// The source that the packet names.
        from: IpAddr,
        to: IpAddr,
        /// By which interface; absent: `eth0`.
        interface: Option<String>,
    },
    /// Makes a stream socket and keeps it.
    Make {
        /// Of this one's family.
        to: SocketAddr,
    },
    /// Makes a stream socket, connects it and keeps it.
    Keep { way: stream::Way, to: SocketAddr },
    /// Writes to the oldest kept socket, which stays.
    Write { text: String },
    /// Reads from the oldest kept socket, which stays: the body has what came.
    Read,
    /// Asks for the ends of the oldest kept socket or held connection: the body has its own address and its peer's.
    Ends,
    /// Connects the oldest kept socket, and asks for credentials on it.
    ConnectKept { to: SocketAddr },
    /// Asks for credentials on the oldest kept socket, as it is.
    AskKept,
    /// Moves the process.
    Move { cgroup: PathBuf },
    /// Listens for a socket from another process.
    Expect { path: PathBuf },
    /// Passes the oldest kept socket to another process.
    Pass { path: PathBuf },
    /// Keeps the socket that was passed.
    Receive,
    /// Listens on a port, and gives those who come credentials of its own.
    Squat {
        /// Where.
        at: SocketAddr,
        /// With `SO_REUSEPORT`.
        reuse_port: bool,
    },
    /// Binds a stream socket, and lets it go.
    Bind {
        /// Where.
        at: SocketAddr,
        /// With `SO_REUSEPORT`.
        reuse_port: bool,
    },
    /// Asks how many came to the listeners.
    Caught,
    /// Opens connections and holds them: the body has how many, and how many failed.
    Hold { to: SocketAddr, count: u32 },
    /// Connects sockets, lets each go (`AF_UNSPEC`), begins to connect it elsewhere, and holds it.
    Reconnect {
        to: SocketAddr,
        /// And where to by turns then.
        then: Vec<SocketAddr>,
        count: usize,
    },
    /// Asks how many of the held connections have a peer.
    Connected,
    /// Lets go of listeners and of held connections.
    Release,
    /// Becomes another user, and asks an agent for its sockets: the body has how many bytes and sockets came.
    AskForSockets {
        /// Where the agent listens.
        path: PathBuf,
        /// The user, and its group.
        uid: u32,
    },
}

/// What a process holds between orders.
#[derive(Debug, Default)]
struct Attacker {
    kept: Kept,
    occupied: Occupied,
}

/// Does what the lines of stdin order, and prints an [`Attempt`] for each, until stdin ends.
pub fn main() -> Result<()> {
    raise_file_limit()?;
    let mut attacker = Attacker::default();
    let mut stdout = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line.context("reading an order")?;
        let order = serde_json::from_str(&line).with_context(|| format!("an order: {line}"))?;
        serde_json::to_writer(&mut stdout, &attacker.attempt(&order)).context("printing")?;
        stdout.write_all(b"\n").and_then(|()| stdout.flush()).context("printing")?;
    }
    Ok(())
}

// === impl Attacker ===

impl Attacker {
    fn attempt(&mut self, order: &Order) -> Attempt {
        let started = Instant::now();
        let mut attempt = Attempt { step: "connect".to_owned(), ..Attempt::default() };
        let limit = Duration::from_millis(order.timeout_ms.max(1));
        if let Err(error) = self.carry_out(&order.attack, limit, &mut attempt) {
            attempt.error = Some(name(&error));
        }
        attempt.micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        attempt
    }

    fn carry_out(
        &mut self,
        attack: &Attack,
        limit: Duration,
        attempt: &mut Attempt,
    ) -> io::Result<()> {
        let kept = &mut self.kept;
        match attack {
            Attack::Stream { way, to, from } => {
                let mut open = || Stream::open(*way, *to, *from, limit);
                converse(&Options::default(), attempt, &mut open)
            }
            Attack::ConnectKept { to } => converse(&once(), attempt, &mut || {
                let socket = kept.take()?;
                socket.connect(&(*to).into())?;
                Stream::connected(socket, limit)
            }),
            Attack::AskKept => {
                converse(&once(), attempt, &mut || Stream::connected(kept.take()?, limit))
            }
            other => {
                "do".clone_into(&mut attempt.step);
                attempt.body = match self.asked(other) {
                    Some(said) => said?,
                    None => self.prepare(other, limit).map(|()| String::new())?,
                };
                Ok(())
            }
        }
    }

    /// Those of which there is something to say.
    fn asked(&mut self, attack: &Attack) -> Option<io::Result<String>> {
        Some(match attack {
            Attack::Hold { to, count } => self.occupied.hold(*to, *count),
            Attack::Caught => Ok(self.occupied.caught().to_string()),
            Attack::Connected => Ok(self.occupied.connected().to_string()),
            Attack::Read => self.kept.read(),
            Attack::Ends => self.kept.oldest().or_else(|_| self.occupied.oldest()).map(ends),
            Attack::AskForSockets { path, uid } => handover::ask_for_sockets(path, *uid),
            _ => return None,
        })
    }

    /// Those that ask for nothing.
    fn prepare(&mut self, attack: &Attack, limit: Duration) -> io::Result<()> {
        match attack {
            Attack::Datagram { way, to } => datagram::send(*way, *to),
            Attack::Raw { way, from, to } => raw::send(*way, *from, *to),
            Attack::Frame { way, from, to, interface } => {
                frame::send(*way, *from, *to, interface.as_deref())
            }
            Attack::Make { to } => self.kept.make(*to, limit),
            Attack::Keep { way, to } => self.kept.connect(*way, *to, limit),
            Attack::Write { text } => self.kept.write(text),
            Attack::Bind { at, reuse_port } => occupy::bind(*at, *reuse_port),
            Attack::Reconnect { to, then, count } => self.occupied.reconnect(*to, then, *count),
            Attack::Move { cgroup } => handover::move_to(cgroup),
            Attack::Expect { path } => self.kept.expect(path),
            Attack::Pass { path } => self.kept.pass(path),
            Attack::Receive => self.kept.receive(),
            Attack::Squat { at, reuse_port } => self.occupied.squat(*at, *reuse_port),
            Attack::Release => {
                self.occupied.release();
                Ok(())
            }
            // Elsewhere.
            _ => Ok(()),
        }
    }
}

/// Its own address and its peer's, as far as it has them.
fn ends(socket: &Socket) -> String {
    let [own, peer] = [socket.local_addr(), socket.peer_addr()].map(|address| {
        address.ok().and_then(|address| address.as_socket()).map(|address| address.to_string())
    });
    [own, peer].map(|address| address.unwrap_or_else(|| "-".to_owned())).join(" ")
}

/// Without a token: where the first request is refused, it is the only one, and the one socket that is kept will do.
fn once() -> Options {
    Options { imds: Imds::V1, ..Options::default() }
}

//! The self-test's client: a process in the self-test's cgroup and network namespace that does what a pod may try, and
//! prints one JSON line for each attempt.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::OwnedFd,
    time::Duration,
};

use kiam_common::redirect::{IMDS_PORT, IMDS_V4, IMDS_V6, REWRITTEN};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        AddressFamily, SendFlags, SocketFlags, SocketType, connect, getsockname, ipproto, sendto,
        socket_with, sockopt,
    },
};
use serde::{Deserialize, Serialize};

/// The longest connect to the agent, and the longest wait for the agent's close.
const PATIENCE: Duration = Duration::from_secs(2);
/// The wait for a connect that must fail.
const STOPPED: Duration = Duration::from_millis(300);
/// An empty UDP datagram from port 12345 to 80, for the raw socket.
const RAW: [u8; 8] = [0x30, 0x39, 0, 80, 0, 8, 0, 0];

/// An attempt of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Attempt {
    /// TCP to 169.254.169.254.
    Ipv4,
    /// TCP to 169.254.169.254 in v4-mapped form.
    Mapped,
    /// TCP to `fd00:ec2::254`.
    Ipv6,
    /// A UDP datagram to 169.254.169.254.
    Datagram,
    /// A packet of a raw socket to 169.254.169.254.
    Raw,
    /// TCP to an address that another program then rewrites to 169.254.169.254.
    Rewritten,
}

/// The outcome of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// The attempt.
    pub(super) attempt: Attempt,
    /// The source port, host order; 0 for none.
    pub(super) port: u16,
    /// The error number; `None` if it connected, or sent.
    pub(super) errno: Option<i32>,
}

/// Runs the hidden command: makes every attempt and prints its outcome.
///
/// # Errors
///
/// Those of printing.
pub fn client() -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    let attempts = [
        (Attempt::Ipv4, SocketAddr::from((IMDS_V4, IMDS_PORT)), PATIENCE),
        (Attempt::Mapped, (IMDS_V4.to_ipv6_mapped(), IMDS_PORT).into(), PATIENCE),
        (Attempt::Ipv6, (IMDS_V6, IMDS_PORT).into(), PATIENCE),
        (Attempt::Rewritten, (REWRITTEN, IMDS_PORT).into(), STOPPED),
    ];
    for (attempt, to, limit) in attempts {
        let mut port = 0;
        let errno = errno(tcp(to, limit, &mut port));
        print(&mut stdout, &Outcome { attempt, port, errno })?;
    }
    for (attempt, sent) in [(Attempt::Datagram, datagram()), (Attempt::Raw, raw())] {
        print(&mut stdout, &Outcome { attempt, port: 0, errno: errno(sent) })?;
    }
    Ok(())
}

fn print(stdout: &mut impl io::Write, outcome: &Outcome) -> io::Result<()> {
    serde_json::to_writer(&mut *stdout, outcome)?;
    stdout.write_all(b"\n")
}

fn errno(result: io::Result<()>) -> Option<i32> {
    result.err().map(|error| error.raw_os_error().unwrap_or(libc::EIO))
}

/// Connects, and waits until the other end closes, since the kernel's record is removed when this end closes.
fn tcp(to: SocketAddr, limit: Duration, port: &mut u16) -> io::Result<()> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    *port = SocketAddr::try_from(getsockname(&socket)?)?.port();
    wait(&socket, PollFlags::OUT, limit)?;
    sockopt::socket_error(&socket)??;
    // It is connected, whether the agent closes it in time or not.
    let _ = wait(&socket, PollFlags::IN | PollFlags::RDHUP, limit);
    Ok(())
}

fn wait(socket: &OwnedFd, events: PollFlags, limit: Duration) -> io::Result<()> {
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let ready = poll(&mut [PollFd::new(socket, events)], Some(&limit))?;
    if ready == 0 { Err(Errno::TIMEDOUT.into()) } else { Ok(()) }
}

fn datagram() -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.send_to(b"kiam", (IMDS_V4, IMDS_PORT)).map(drop)
}

fn raw() -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::UDP))?;
    let to = SocketAddr::from((IMDS_V4, 0));
    Ok(sendto(&socket, &RAW, SendFlags::empty(), &to).map(drop)?)
}

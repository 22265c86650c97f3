//! The self-test's other half: a process of its own, in the self-test's cgroup and network namespace, that tries what a
//! pod may try and says what came of it, one JSON line an attempt.

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

/// How long a connection to the agent may take, and then the agent to close it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one that must go nowhere is waited for.
const STOPPED: Duration = Duration::from_millis(300);
/// A UDP datagram of no content from port 12345 to 80: the shortest thing that a raw socket can send.
const RAW: [u8; 8] = [0x30, 0x39, 0, 80, 0, 8, 0, 0];

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Attempt {
    /// TCP to 169.254.169.254.
    Ipv4,
    /// TCP to the same in v4-mapped form.
    Mapped,
    /// TCP to `fd00:ec2::254`.
    Ipv6,
    /// A UDP datagram.
    Datagram,
    /// What a raw socket sends.
    Raw,
    /// TCP to an address that another program then rewrites to 169.254.169.254.
    Rewritten,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Which.
    pub(super) attempt: Attempt,
    /// The port it came from, host order; 0 for none.
    pub(super) port: u16,
    /// The error number that ended it; `None`: connected, or sent.
    pub(super) errno: Option<i32>,
}

/// Makes every attempt and prints what came of it: the whole of the hidden command.
///
/// # Errors
///
/// When nothing can be printed.
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

/// Connects, and waits until the other end closes: the kernel's record goes when this end does.
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
    // Closed or not, it is connected; how long that takes is the agent's affair.
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

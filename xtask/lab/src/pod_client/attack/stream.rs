//! Streams to the metadata service, by every call that can connect one.

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::sys::{mark, set_option};

/// How the stream is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// connect(2).
    Connect,
    /// connect(2) of a non-blocking socket, and poll(2).
    NonBlocking,
    /// TCP fast open: `sendto(MSG_FASTOPEN)` without a connect.
    FastOpenSend,
    /// TCP fast open: `TCP_FASTOPEN_CONNECT`, so that the first write connects.
    FastOpenConnect,
    /// `IORING_OP_CONNECT`.
    IoUring,
    /// connect(2) of an MPTCP socket.
    Mptcp,
    /// connect(2) of a socket with `IPV6_V6ONLY`.
    OnlyV6,
    /// connect(2) of a socket with `IP_TRANSPARENT`, which may bind any source address.
    Transparent,
    /// connect(2) of a socket in `TCP_REPAIR`, which is ESTABLISHED without a handshake, and then sends.
    Repair,
}

/// A stream that may still have to say where it goes, with its first write.
#[derive(Debug)]
pub(super) struct Stream {
    socket: Socket,
    first_to: Option<SockAddr>,
}

// === impl Stream ===

impl Stream {
    /// Connects to `to`, from `from` where that is said; no step takes longer than `limit`.
    pub(super) fn open(
        way: Way,
        to: SocketAddr,
        from: Option<SocketAddr>,
        limit: Duration,
    ) -> io::Result<Self> {
        let socket = make(way, to, limit)?;
        if let Some(from) = from {
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
        }
        let address = SockAddr::from(to);
        let mut first_to = None;
        match way {
            Way::NonBlocking => socket.connect_timeout(&address, limit)?,
            Way::FastOpenSend => first_to = Some(address),
            Way::IoUring => connect_by_ring(&socket, &address, limit)?,
            Way::Repair => connect_in_repair(&socket, &address)?,
            _ => socket.connect(&address)?,
        }
        Ok(Self { socket, first_to })
    }

    /// Goes on with a socket that is connected.
    pub(super) fn connected(socket: Socket, limit: Duration) -> io::Result<Self> {
        limits(&socket, limit)?;
        Ok(Self { socket, first_to: None })
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.socket).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.first_to.take() {
            Some(to) => self.socket.send_to_with_flags(bytes, &to, libc::MSG_FASTOPEN),
            None => self.socket.send_with_flags(bytes, libc::MSG_NOSIGNAL),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket of the family of `to`, as its way wants it.
pub(super) fn make(way: Way, to: SocketAddr, limit: Duration) -> io::Result<Socket> {
    let protocol = if way == Way::Mptcp { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
    limits(&socket, limit)?;
    mark(&socket)?;
    // Its end is one packet at once, so that none of it is taken for the next attempt's.
    socket.set_linger(Some(Duration::ZERO))?;
    match way {
        Way::FastOpenConnect => {
            set_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
        }
        Way::OnlyV6 => socket.set_only_v6(true)?,
        Way::Transparent => socket.set_ip_transparent_v4(true)?,
        Way::Repair => set_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?,
        _ => {}
    }
    Ok(socket)
}

fn limits(socket: &Socket, limit: Duration) -> io::Result<()> {
    // Limits connect(2) too, which then fails with EINPROGRESS.
    socket.set_write_timeout(Some(limit))?;
    socket.set_read_timeout(Some(limit))
}

/// On a thread of its own: what a ring leaves to be done at its end would interrupt this one's next call.
fn connect_by_ring(socket: &Socket, to: &SockAddr, limit: Duration) -> io::Result<()> {
    thread::scope(|scope| {
        let connecting = scope.spawn(|| ring_connect(socket, to, limit));
        connecting.join().expect("nothing there panics")
    })
}

fn ring_connect(socket: &Socket, to: &SockAddr, limit: Duration) -> io::Result<()> {
    let mut ring = IoUring::new(4)?;
    let fd = types::Fd(socket.as_raw_fd());
    let limit = types::Timespec::from(limit);
    let connect = opcode::Connect::new(fd, to.as_ptr().cast(), to.len()).build();
    let connect = connect.flags(squeue::Flags::IO_LINK).user_data(1);
    let timeout = opcode::LinkTimeout::new(&raw const limit).build().user_data(2);
    // SAFETY: the socket, the address and the time live until both have completed, below.
    unsafe { ring.submission().push_multiple(&[connect, timeout]) }.map_err(io::Error::other)?;
    ring.submit_and_wait(2)?;
    let answer = ring.completion().find(|entry| entry.user_data() == 1).map(|entry| entry.result());
    match answer {
        Some(0) => Ok(()),
        // The timeout cancelled it.
        Some(error) if error == -libc::ECANCELED => {
            Err(io::Error::from_raw_os_error(libc::ETIMEDOUT))
        }
        Some(error) => Err(io::Error::from_raw_os_error(-error)),
        None => Err(io::Error::other("io_uring has not answered")),
    }
}

/// In repair mode connect(2) makes the socket ESTABLISHED at once; afterwards it sends as any other does.
fn connect_in_repair(socket: &Socket, to: &SockAddr) -> io::Result<()> {
    socket.connect(to)?;
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 0)
}

//! Sockets and processes that change hands: made here, used there.

use std::{
    collections::VecDeque,
    fs,
    io::{self, IoSlice, IoSliceMut, Read as _, Write as _},
    net::SocketAddr,
    os::fd::OwnedFd,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use rustix::{
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::{Gid, Uid},
    thread::{set_thread_res_gid, set_thread_res_uid},
};
use socket2::Socket;

use super::stream::{self, Way};

/// What a process holds for later.
#[derive(Debug, Default)]
pub(super) struct Kept {
    sockets: VecDeque<Socket>,
    listener: Option<UnixListener>,
}

// === impl Kept ===

impl Kept {
    /// Makes a socket for `to` and keeps it.
    pub(super) fn make(&mut self, to: SocketAddr, limit: Duration) -> io::Result<()> {
        self.sockets.push_back(stream::make(Way::Connect, to, limit)?);
        Ok(())
    }

    /// Makes one and connects it.
    pub(super) fn connect(&mut self, way: Way, to: SocketAddr, limit: Duration) -> io::Result<()> {
        let socket = stream::make(way, to, limit)?;
        socket.connect(&to.into())?;
        self.sockets.push_back(socket);
        Ok(())
    }

    /// Writes `text` to the oldest, which stays.
    pub(super) fn write(&self, text: &str) -> io::Result<()> {
        self.oldest()?.send_with_flags(text.as_bytes(), libc::MSG_NOSIGNAL).map(drop)
    }

    /// Reads from the oldest, which stays.
    pub(super) fn read(&self) -> io::Result<String> {
        let mut bytes = [0; 4096];
        let length = self.oldest()?.read(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
    }

    /// The oldest that is kept.
    pub(super) fn oldest(&self) -> io::Result<&Socket> {
        self.sockets.front().ok_or_else(none)
    }

    /// The oldest that is kept, which is kept no more.
    pub(super) fn take(&mut self) -> io::Result<Socket> {
        self.sockets.pop_front().ok_or_else(none)
    }

    /// Listens at `path`, for one [`Kept::pass`] of another process.
    pub(super) fn expect(&mut self, path: &Path) -> io::Result<()> {
        self.listener = Some(UnixListener::bind(path)?);
        Ok(())
    }

    /// Sends the oldest kept socket to who listens at `path`, by `SCM_RIGHTS`.
    pub(super) fn pass(&mut self, path: &Path) -> io::Result<()> {
        let socket = self.take()?;
        let stream = UnixStream::connect(path)?;
        let descriptors = [std::os::fd::AsFd::as_fd(&socket)];
        let mut space = [0; rustix::cmsg_space!(ScmRights(1))].map(std::mem::MaybeUninit::new);
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        sendmsg(&stream, &[IoSlice::new(b"x")], &mut control, SendFlags::empty())?;
        Ok(())
    }

    /// Keeps the socket that another process has passed, and stops listening.
    pub(super) fn receive(&mut self) -> io::Result<()> {
        let listener = self.listener.take();
        let listener = listener.ok_or_else(|| io::Error::other("listens nowhere"))?;
        let (stream, _) = listener.accept()?;
        let (_, mut received) = descriptors(&stream)?;
        let received = received.pop().ok_or_else(|| io::Error::other("no socket has come"))?;
        self.sockets.push_back(received.into());
        Ok(())
    }
}

/// Asks the agent that listens at `path` for its sockets, as user `uid`; how many bytes and descriptors came.
pub(super) fn ask_for_sockets(path: &Path, uid: u32) -> io::Result<String> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let answer = stream.write_all(b"kiam-handover 1\n").and_then(|()| descriptors(&stream));
    let (bytes, count) = match answer {
        Ok((bytes, received)) => (bytes, received.len()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ECONNRESET | libc::EPIPE)) => {
            (0, 0)
        }
        Err(error) => return Err(error),
    };
    Ok(format!("{bytes} {count}"))
}

/// One message with the descriptors that come with it, and its length.
fn descriptors(stream: &UnixStream) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut byte = [0];
    let mut space = [0; rustix::cmsg_space!(ScmRights(8))].map(std::mem::MaybeUninit::new);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut byte)];
    let message = recvmsg(stream, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut received = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            received.extend(descriptors);
        }
    }
    Ok((message.bytes, received))
}

fn none() -> io::Error {
    io::Error::other("no socket is kept")
}

/// Moves this process into the cgroup at `path`, as root on the host can.
pub(super) fn move_to(path: &Path) -> io::Result<()> {
    // "0" is the writer itself.
    fs::write(path.join("cgroup.procs"), "0")
}

//! Sockets and processes that change hands: made here, used there.

use std::{
    collections::VecDeque,
    fs,
    io::{self, IoSlice, IoSliceMut},
    net::SocketAddr,
    os::fd::OwnedFd,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
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
    pub(super) fn connect(&mut self, to: SocketAddr, limit: Duration) -> io::Result<()> {
        let socket = stream::make(Way::Connect, to, limit)?;
        socket.connect(&to.into())?;
        self.sockets.push_back(socket);
        Ok(())
    }

    /// The oldest that is kept, which is kept no more.
    pub(super) fn take(&mut self) -> io::Result<Socket> {
        self.sockets.pop_front().ok_or_else(|| io::Error::other("no socket is kept"))
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
        let mut byte = [0];
        let mut space = [0; rustix::cmsg_space!(ScmRights(1))].map(std::mem::MaybeUninit::new);
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let slices = &mut [IoSliceMut::new(&mut byte)];
        recvmsg(&stream, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let received: Option<OwnedFd> = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let received = received.ok_or_else(|| io::Error::other("no socket has come"))?;
        self.sockets.push_back(received.into());
        Ok(())
    }
}

/// Moves this process into the cgroup at `path`, as root on the host can.
pub(super) fn move_to(path: &Path) -> io::Result<()> {
    // "0" is the writer itself.
    fs::write(path.join("cgroup.procs"), "0")
}

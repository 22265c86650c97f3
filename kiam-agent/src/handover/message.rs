//! What is written over the socket.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::TcpListener,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt,
    },
};
use tokio::{io::Interest, net::UnixStream};

/// The successor's question, with the protocol's version.
pub(super) const REQUEST: &[u8; 16] = b"kiam-handover 1\n";
/// The question whether an agent serves there, of the same length; answered by one byte.
pub(super) const PRESENCE: &[u8; REQUEST.len()] = b"kiam-presence 1\n";
/// The answer.
pub(super) const PRESENT: u8 = b'P';
/// The successor's last word: it serves on all the sockets.
pub(super) const TAKEN: u8 = b'T';
/// The same, but some of its sockets are others: what is in the predecessor's queue is its own.
pub(super) const TAKEN_ELSEWHERE: u8 = b'E';
/// Sockets of one message; the kernel takes up to 253 (`SCM_MAX_FD`).
const MAX_SOCKETS: usize = 128;
/// Messages that are read: twice two sockets for each of more pods than a node runs.
const MAX_MESSAGES: usize = 64;

/// Sends the sockets, some with each message, which is one byte, their number; a message of none is the end.
pub(super) async fn send(stream: &UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
    for some in sockets.chunks(MAX_SOCKETS) {
        send_some(stream, some).await?;
    }
    send_some(stream, &[]).await
}

async fn send_some(stream: &UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
    let count = [u8::try_from(borrowed.len()).expect("there are at most MAX_SOCKETS")];
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !borrowed.is_empty() {
                let fits = control.push(SendAncillaryMessage::ScmRights(&borrowed));
                debug_assert!(fits, "the space is for MAX_SOCKETS");
            }
            sendmsg(stream, &[IoSlice::new(&count)], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// Receives what [`send`] sent. `None`: the other end closed instead. What is no listening TCP socket is dropped.
pub(super) async fn receive(stream: &UnixStream) -> io::Result<Option<Vec<TcpListener>>> {
    let mut all = Vec::new();
    for _ in 0..MAX_MESSAGES {
        match receive_some(stream).await? {
            None => return Ok(None),
            Some((0, _)) => return Ok(Some(all)),
            Some((_, sockets)) => all.extend(sockets),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the sockets have no end"))
}

/// One message: how many sockets it has, and those of them that are of use.
async fn receive_some(stream: &UnixStream) -> io::Result<Option<(u8, Vec<TcpListener>)>> {
    loop {
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, || Ok(receive_now(stream)?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done?,
        }
    }
}

type Received = io::Result<Option<(u8, Vec<TcpListener>)>>;

fn receive_now(stream: &UnixStream) -> rustix::io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut count = [0_u8];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut count)], &mut control, flags)?;
    let sockets: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(Ok(None));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || sockets.len() != usize::from(count[0]) {
        let text = format!("{} of {} sockets came", sockets.len(), count[0]);
        return Ok(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    let listening = |socket: &OwnedFd| sockopt::socket_acceptconn(socket).unwrap_or_default();
    let listeners = sockets.into_iter().filter(listening).map(TcpListener::from);
    let listeners = listeners.filter(|listener| listener.local_addr().is_ok()).collect();
    Ok(Ok(Some((count[0], listeners))))
}

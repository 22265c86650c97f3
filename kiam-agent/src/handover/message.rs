//! The messages on the handover socket.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::{
    cmsg_space,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use tokio::{io::Interest, net::UnixStream};

/// The successor's request for the sockets, with the protocol's version.
pub(super) const REQUEST: &[u8; 16] = b"kiam-handover 1\n";
/// The request for the cached credentials, of the same length. The answer is one descriptor of sealed memory.
pub(super) const CREDENTIALS: &[u8; REQUEST.len()] = b"kiam-sessions 1\n";
/// The request whether an agent serves, of the same length. The answer is one byte.
pub(super) const PRESENCE: &[u8; REQUEST.len()] = b"kiam-presence 1\n";
/// The answer of an agent that serves.
pub(super) const PRESENT: u8 = b'P';
/// The answer of an agent that serves but ends soon, so that the successor must not wait.
pub(super) const LEAVING: u8 = b'L';
/// The successor's last message: it serves on all the sockets.
pub(super) const TAKEN: u8 = b'T';
/// The successor's last message if it uses other sockets: the predecessor's queue is the predecessor's to serve.
pub(super) const TAKEN_ELSEWHERE: u8 = b'E';
/// The most descriptors of one message; the kernel allows 253 (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 128;
/// The most messages of one answer: enough for twice two sockets for each of more pods than a node runs.
const MAX_MESSAGES: usize = 64;

/// Sends the descriptors in several messages. Each message has one byte, its number of descriptors. A message without
/// descriptors is the end.
pub(super) async fn send(stream: &UnixStream, descriptors: &[OwnedFd]) -> io::Result<()> {
    for some in descriptors.chunks(MAX_DESCRIPTORS) {
        send_some(stream, some).await?;
    }
    send_some(stream, &[]).await
}

async fn send_some(stream: &UnixStream, descriptors: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<_> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
    let count = [u8::try_from(borrowed.len()).expect("there are at most MAX_DESCRIPTORS")];
    loop {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !borrowed.is_empty() {
                let fits = control.push(SendAncillaryMessage::ScmRights(&borrowed));
                debug_assert!(fits, "the space is for MAX_DESCRIPTORS");
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

/// Receives what [`send`] sent; `None` if the peer closed the connection instead.
pub(super) async fn receive(stream: &UnixStream) -> io::Result<Option<Vec<OwnedFd>>> {
    let mut all = Vec::new();
    for _ in 0..MAX_MESSAGES {
        match receive_some(stream).await? {
            None => return Ok(None),
            Some(some) if some.is_empty() => return Ok(Some(all)),
            Some(some) => all.extend(some),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the descriptors have no end"))
}

/// The descriptors of one message.
async fn receive_some(stream: &UnixStream) -> ReceivedDescriptors {
    loop {
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, || Ok(receive_now(stream)?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done?,
        }
    }
}

type ReceivedDescriptors = io::Result<Option<Vec<OwnedFd>>>;

fn receive_now(stream: &UnixStream) -> rustix::io::Result<ReceivedDescriptors> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut count = [0_u8];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut count)], &mut control, flags)?;
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 {
        return Ok(Ok(None));
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() != usize::from(count[0]) {
        let text = format!("{} of {} descriptors came", descriptors.len(), count[0]);
        return Ok(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    Ok(Ok(Some(descriptors)))
}

//! Netlink requests, one at a time and blocking, since the kernel answers at once.

use std::{fmt::Debug, io};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_SOCK_DIAG},
};

/// A netlink socket, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink(Socket);

// === impl Netlink ===

impl Netlink {
    /// A socket for rules, routes and links.
    pub(crate) fn route() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE)
    }

    /// A socket for the kernel's list of sockets.
    pub(crate) fn sock_diag() -> io::Result<Self> {
        Self::open(NETLINK_SOCK_DIAG)
    }

    /// A socket for netfilter.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Sends `message`, with `flags` beside the usual ones, and waits for the acknowledgement.
    pub(crate) fn order<I>(&self, message: I, flags: u16) -> io::Result<()>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.answers(|_: I| Ok(()))
    }

    /// All objects that `question` asks for. Messages that can't be parsed are skipped, since the agent wrote none of them.
    /// Objects that change meanwhile may be missing or duplicate; the kernel notifies about the change, too.
    pub(crate) fn dump<I>(&self, question: I) -> io::Result<Vec<I>>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        let mut all = Vec::new();
        self.each(question, |answer| {
            all.push(answer);
            Ok(())
        })?;
        Ok(all)
    }

    /// As [`Self::dump`], one object at a time, where pods decide their number. After an error of `take` the socket can't be
    /// used again.
    pub(crate) fn each<I>(
        &self,
        question: I,
        take: impl FnMut(I) -> io::Result<()>,
    ) -> io::Result<()>
    where
        I: NetlinkSerializable + NetlinkDeserializable + Debug,
    {
        self.send(question, NLM_F_REQUEST | NLM_F_DUMP)?;
        self.answers(take)
    }

    fn send<I: NetlinkSerializable + Debug>(&self, message: I, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0).map(drop)
    }

    /// Receives answers until the end of the dump, an acknowledgement, or an error.
    fn answers<I: NetlinkDeserializable + Debug>(
        &self,
        mut take: impl FnMut(I) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let (bytes, _) = self.0.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while let Some(length) = message_length(rest) {
                match NetlinkMessage::<I>::deserialize(&rest[..length]) {
                    Ok(NetlinkMessage { payload, .. }) => match payload {
                        NetlinkPayload::InnerMessage(message) => take(message)?,
                        NetlinkPayload::Error(error) if error.code.is_some() => {
                            return Err(error.to_io());
                        }
                        NetlinkPayload::Error(_) => return Ok(()),
                        NetlinkPayload::Done(done) if done.code < 0 => {
                            return Err(io::Error::from_raw_os_error(-done.code));
                        }
                        NetlinkPayload::Done(_) => return Ok(()),
                        _ => {}
                    },
                    Err(error) => tracing::trace!(%error, "Skipped a netlink message"),
                }
                // Messages begin at multiples of four.
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

/// The length of the first message in `bytes`; `None` if there is no complete one.
fn message_length(bytes: &[u8]) -> Option<usize> {
    let length = NetlinkBuffer::new_checked(bytes).ok()?.length() as usize;
    (length > 0).then_some(length)
}

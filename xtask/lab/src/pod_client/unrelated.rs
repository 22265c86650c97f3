//! What pods do all the time and the agent has no part in: connections, datagrams and binds to elsewhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context, Result};

/// Does each of them `rounds` times, over loopback, by both families where there are both.
pub(super) fn main(rounds: u32) -> Result<()> {
    by(Ipv4Addr::LOCALHOST.into(), rounds)?;
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        by(Ipv6Addr::LOCALHOST.into(), rounds)?;
    }
    Ok(())
}

fn by(address: IpAddr, rounds: u32) -> Result<()> {
    let any = SocketAddr::new(address, 0);
    let listener = TcpListener::bind(any).context("listening")?;
    let to = listener.local_addr().context("asking for an address")?;
    let receiver = UdpSocket::bind(any).context("binding")?;
    let datagrams_to = receiver.local_addr().context("asking for an address")?;
    for _ in 0..rounds {
        let stream = TcpStream::connect(to).context("connecting")?;
        stream.peer_addr().context("asking for the peer")?;
        listener.accept().context("accepting")?;
        let sender = UdpSocket::bind(any).context("binding")?;
        sender.send_to(b"x", datagrams_to).context("sending")?;
        receiver.recv(&mut [0]).context("receiving")?;
    }
    Ok(())
}

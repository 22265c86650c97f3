//! Packets that come with no hop left.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use rustix::net::{AddressFamily, sockopt::socket_domain};

/// `IP_MINTTL` and `IPV6_MINHOPCOUNT` of `linux/in.h` and `linux/in6.h`.
const IP_MINTTL: libc::c_int = 21;
const IPV6_MINHOPCOUNT: libc::c_int = 73;
/// The fewest hops left of a packet that would have gone one hop further.
const ONE_MORE: libc::c_int = 2;

/// Has the kernel drop what comes to `socket` with no hop left, which would not have reached a pod.
///
/// # Errors
///
/// The system's.
pub fn drop_last_hop(socket: impl AsFd) -> io::Result<()> {
    let socket = socket.as_fd();
    let (level, name) = match socket_domain(socket)? {
        AddressFamily::INET6 => (libc::IPPROTO_IPV6, IPV6_MINHOPCOUNT),
        _ => (libc::IPPROTO_IP, IP_MINTTL),
    };
    let least = ONE_MORE;
    // SAFETY: the descriptor is open, and the kernel reads as many bytes of `least` as it has.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const least).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use rustix::net::sockopt::set_ip_ttl;

    use super::*;

    #[test]
    fn an_answer_without_a_hop_left_is_dropped_and_another_is_not() {
        for (hops, arrives) in [(1, false), (2, true), (64, true)] {
            let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            drop_last_hop(&client).unwrap();
            set_ip_ttl(&server, hops).unwrap();
            server.write_all(b"x").unwrap();
            client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            assert_eq!(client.read_exact(&mut [0]).is_ok(), arrives, "{hops}");
        }
    }
}

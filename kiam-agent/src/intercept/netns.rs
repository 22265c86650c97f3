//! The agent's own network namespace, which is the node's.

use std::{io, net::UdpSocket, os::fd::AsRawFd as _};

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`. Kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of this thread's network namespace, as `bpf_get_netns_cookie` shows it to the programs.
pub(super) fn own_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind(("127.0.0.1", 0))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

//! The agent's own network namespace, which is the node's.

use std::{
    io,
    net::{TcpListener, UdpSocket},
    os::fd::{AsFd, AsRawFd as _},
};

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`. Kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of this thread's network namespace, which is the node's; `None` below kernel 5.14, where it can't be asked for.
pub(crate) fn host_netns() -> io::Result<Option<u64>> {
    or_unknown(own_cookie())
}

fn or_unknown(own: io::Result<u64>) -> io::Result<Option<u64>> {
    match own {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(None),
        answer => answer.map(Some),
    }
}

/// The cookie of this thread's network namespace, as `bpf_get_netns_cookie` returns it.
pub(crate) fn own_cookie() -> io::Result<u64> {
    cookie_of(UdpSocket::bind(("127.0.0.1", 0))?)
}

/// The cookie of the network namespace of `socket`, as `bpf_get_netns_cookie` returns it. It is unique until the node
/// reboots. Kernel 5.14.
///
/// # Errors
///
/// `ENOPROTOOPT` below kernel 5.14.
pub fn cookie_of(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Whether `socket` is in another network namespace than this thread; false below kernel 5.14.
#[must_use]
pub fn is_elsewhere(socket: &TcpListener) -> bool {
    cookie_of(socket).is_ok_and(|cookie| own_cookie().is_ok_and(|own| own != cookie))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_option_does_not_tell_and_another_error_is_one() {
        let errno = io::Error::from_raw_os_error;
        assert_eq!(or_unknown(Ok(7)).unwrap(), Some(7));
        assert_eq!(or_unknown(Err(errno(libc::ENOPROTOOPT))).unwrap(), None);
        assert!(or_unknown(Err(errno(libc::EPERM))).is_err());
    }
}

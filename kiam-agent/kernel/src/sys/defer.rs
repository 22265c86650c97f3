//! Listeners that accept a connection only once there is data to read.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// The wait for data, in seconds: the shortest possible one.
const WAIT: libc::c_int = 1;

/// Has `listener` accept a connection when the first bytes of a request have come (`TCP_DEFER_ACCEPT`), so that the accept
/// loop is woken once and not twice. A silent connection is accepted after about a second. Until then it waits in the
/// queue of handshakes, which is as long as that of connections.
///
/// # Errors
///
/// The system's.
pub fn defer_accept(listener: impl AsFd) -> io::Result<()> {
    let wait = WAIT;
    // SAFETY: the descriptor is open while it is borrowed, and the option reads an int, which this is.
    let result = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_DEFER_ACCEPT,
            (&raw const wait).cast(),
            size_of_val(&wait) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

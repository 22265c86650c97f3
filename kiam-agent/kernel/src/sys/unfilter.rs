//! Removes the filter of SYNs, which stays with a listening socket across a takeover.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

/// Removes the socket filter of `listener`. A missing filter is no error.
///
/// # Errors
///
/// The system's.
pub fn unfilter(listener: BorrowedFd<'_>) -> io::Result<()> {
    let unused: libc::c_int = 0;
    let length = size_of_val(&unused) as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed, and the option reads an int at most, which this is.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const unused).cast(),
            length,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            error => Err(error),
        },
    }
}

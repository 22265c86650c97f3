//! The agent's own network namespace, which is the node's.

use std::{
    io,
    net::{TcpListener, UdpSocket},
    os::fd::{AsFd, AsRawFd as _},
};

use kiam_common::HOST_NETNS_INITIAL;
use tracing::warn;

use super::{Config, Error, Path, refusal::kernel_release};

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`. Kernel 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie that marks this thread's namespace as the node's, for `HOST_NETNS`.
///
/// Below kernel 5.14, where it can't be asked for, the node's is taken to be the initial namespace. Where
/// that is wrong (a node that is itself a container) no pod passes: nobody is let through by mistake.
pub(super) fn host_netns() -> io::Result<u64> {
    or_initial(own_cookie())
}

/// Ends the start where `config` can't be had on a kernel that does not tell network namespaces apart, and warns of what the
/// agent does there instead.
pub(super) fn check(config: &Config) -> Result<(), Error> {
    // Another failure is the load's to report.
    let told = host_netns().map_or(true, |cookie| cookie != HOST_NETNS_INITIAL);
    judge(config, told, kernel_release())
}

fn judge(config: &Config, told: bool, release: String) -> Result<(), Error> {
    if told || !config.follows_sandboxes() {
        return Ok(());
    }
    if config.listens_inside() && config.path == Path::PodLocal {
        return Err(Error::NoNamespaces { release });
    }
    warn!(
        kernel = release,
        "This kernel does not tell network namespaces apart (5.14 does): all pods use the node's listener and are known by their published addresses, and only the machine's first network namespace counts as the node's"
    );
    Ok(())
}

fn or_initial(own: io::Result<u64>) -> io::Result<u64> {
    match own {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(HOST_NETNS_INITIAL),
        answer => answer,
    }
}

/// The cookie of this thread's network namespace, as `bpf_get_netns_cookie` shows it to the programs.
pub(super) fn own_cookie() -> io::Result<u64> {
    cookie_of(UdpSocket::bind(("127.0.0.1", 0))?)
}

/// The cookie of the network namespace that `socket` is in, as `bpf_get_netns_cookie` shows it to the programs. It
/// names that namespace alone, for as long as the node is up. Kernel 5.14.
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

/// Whether `socket` was made in another network namespace than this thread's. Not where the kernel can't tell.
#[must_use]
pub fn is_elsewhere(socket: &TcpListener) -> bool {
    cookie_of(socket).is_ok_and(|cookie| own_cookie().is_ok_and(|own| own != cookie))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::Mode;
    use kiam_core::telemetry::captured::Captured;

    #[test]
    fn a_kernel_that_tells_no_namespaces_is_warned_of_once_and_pod_local_is_refused() {
        let config = |path, mode| Config {
            path,
            mode,
            attested: true,
            ..Config::new(None, "/sys/fs/bpf/kiam".into())
        };
        let cases = [
            (Path::Auto, Mode::Enforce, true, 1),
            (Path::Node, Mode::Enforce, true, 1),
            (Path::PodLocal, Mode::Enforce, false, 0),
            (Path::PodLocal, Mode::Observe, true, 0),
        ];
        for (path, mode, starts, warnings) in cases {
            let logged = Captured::start(tracing::Level::WARN);
            let config = config(path, mode);
            let judged = judge(&config, false, "5.10.0-46-cloud-amd64".to_owned());
            assert_eq!(judged.is_ok(), starts, "{path:?}");
            let lines = logged.lines_with("known by their published addresses");
            assert_eq!(lines.len(), warnings, "{lines:?}");
            if let Err(error) = judged {
                let text = error.to_string();
                assert!(text.contains("5.10.0-46") && text.contains("--path=auto"), "{text}");
            }
            assert!(judge(&config, true, String::new()).is_ok());
            assert_eq!(logged.lines_with("").len(), warnings, "a newer kernel is not warned of");
        }
    }

    #[test]
    fn a_kernel_without_the_option_means_the_initial_namespace_and_no_other_error_does() {
        let errno = io::Error::from_raw_os_error;
        assert_eq!(or_initial(Ok(7)).unwrap(), 7);
        assert_eq!(or_initial(Err(errno(libc::ENOPROTOOPT))).unwrap(), HOST_NETNS_INITIAL);
        assert!(or_initial(Err(errno(libc::EPERM))).is_err());
    }
}

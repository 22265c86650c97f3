//! Network namespaces without a name: a descriptor keeps each alive, so that nothing is left behind by a killed run.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    sync::Arc,
    thread,
};

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use socket2::{Domain, Protocol, Socket, Type};
use xtask::command::printed_for;

/// Of `asm-generic/socket.h`.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A network namespace of our own. It lives as long as a clone of this, a socket or a process in it.
#[derive(Clone, Debug)]
pub struct Netns(Arc<OwnedFd>);

// === impl Netns ===

impl Netns {
    /// Makes an empty namespace whose loopback is up; IPv6 addresses there are usable at once.
    pub fn create() -> Result<Self> {
        let netns = on_own_thread(|| -> io::Result<OwnedFd> {
            // SAFETY: NEWNET does not unshare the descriptor table, the one flag that is unsafe.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            Ok(fs::File::open("/proc/thread-self/ns/net")?.into())
        })
        .context("making a network namespace")?;
        let netns = Self(Arc::new(netns));
        for scope in ["all", "default"] {
            if has_ipv6() {
                // Duplicate address detection would keep each address unusable for a second.
                netns.sysctl(&format!("ipv6/conf/{scope}/accept_dad"), "0")?;
            }
            netns.sysctl(&format!("ipv4/conf/{scope}/rp_filter"), "0")?;
        }
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// The namespace that the calling process is in.
    pub fn current() -> Result<Self> {
        let file = fs::File::open("/proc/self/ns/net").context("opening /proc/self/ns/net")?;
        Ok(Self(Arc::new(file.into())))
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets made there stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_own_thread(|| {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
                .context("entering a network namespace")?;
            Ok(work())
        })
    }

    /// A TCP listener inside the namespace.
    pub fn listen(&self, address: SocketAddr) -> Result<TcpListener> {
        self.enter(|| TcpListener::bind(address))?
            .with_context(|| format!("listening on {address} in a network namespace"))
    }

    /// A UDP socket inside the namespace.
    pub fn udp(&self, address: SocketAddr) -> Result<UdpSocket> {
        self.enter(|| UdpSocket::bind(address))?
            .with_context(|| format!("binding UDP {address} in a network namespace"))
    }

    /// Writes `value` to `/proc/sys/net/<name>`, which shows the namespace of the thread that opens it.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.enter(|| fs::write(format!("/proc/sys/net/{name}"), value))?
            .with_context(|| format!("setting net/{name} to {value}"))
    }

    /// Runs `ip` inside the namespace, with a command per line, such as `link set lo up`.
    pub fn ip(&self, commands: &str) -> Result<()> {
        let mut ip = self.command("ip");
        let done = printed_for(ip.args(["-batch", "-"]), commands);
        done.map(drop).with_context(|| format!("ip (iproute2), told\n{commands}"))
    }

    /// A command that will run inside the namespace.
    ///
    /// Not `ip netns exec`: that unmounts /sys, and with it cgroup2 and bpffs.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.clone().adopt(&mut command);
        command
    }

    /// Makes `command` start inside the namespace.
    pub fn adopt(self, command: &mut Command) {
        let setns = move || {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(io::Error::from)
        };
        // SAFETY: between fork and exec, setns(2) is one system call: no allocation, no lock.
        unsafe { command.pre_exec(setns) };
    }

    /// A path by which other processes can enter (`nsenter --net=…`) for as long as this process keeps it.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether the kernel has IPv6, which `ipv6.disable=1` on its command line leaves out.
#[must_use]
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether the kernel has MPTCP, which Debian's 5.10 was built without.
#[must_use]
pub fn has_mptcp() -> bool {
    Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).is_ok()
}

/// Whether the kernel tells network namespaces apart, as 5.14 does; where it does not, all pods go by the node's path.
pub fn tells_namespaces_apart() -> Result<bool> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).context("binding UDP on loopback")?;
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
    Ok(result == 0)
}

/// Namespaces belong to threads: whatever moves a thread must not give it back to a pool.
fn on_own_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

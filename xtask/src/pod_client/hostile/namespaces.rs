//! Network namespaces of a pod's own, in which it may have whatever address it likes.

use std::{
    io,
    mem::size_of,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::Mutex,
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use tokio::time::Instant;

use super::{Course, begin_connect, imds, socket};

const LOOPBACK: &[u8] = b"lo";
/// No longer than this, whatever there is by then.
const MOST: Duration = Duration::from_secs(12);
const THREADS: u32 = 2;
const PAUSE: Duration = Duration::from_millis(20);

/// Moves the calling thread into a new network namespace, whose loopback interface has all addresses of the class A
/// network of `address`: the lab's, its own and others'.
pub(super) fn enter_new(address: Ipv4Addr) -> io::Result<()> {
    // SAFETY: NEWNET does not unshare the descriptor table, the one flag that is unsafe.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    let control = socket()?;
    let mut request = interface_request();
    let mut bytes = [0; size_of::<libc::sockaddr>()];
    bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    bytes[4..8].copy_from_slice(&address.octets());
    // SAFETY: both are plain bytes of this size.
    request.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<[u8; 16], libc::sockaddr>(bytes) };
    change(&control, libc::SIOCSIFADDR, &request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    change(&control, libc::SIOCSIFFLAGS, &request)
}

/// Listens where others believe the node's listener to be, and hangs up on everybody.
pub(super) fn pretend_to_be(listener: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(listener)?;
    thread::spawn(move || listener.incoming().for_each(drop));
    Ok(())
}

/// Makes `count` namespaces and keeps them; from each, one connection has been tried.
pub(super) fn storm(course: &Course, count: u32, listener: SocketAddr) -> io::Result<()> {
    let kept = Mutex::new(Vec::new());
    let started = Instant::now();
    let Some(address) = v4(listener) else { return Err(io::ErrorKind::InvalidInput.into()) };
    course.on_threads(THREADS, || {
        for _ in 0..count.div_ceil(THREADS) {
            if started.elapsed() > MOST || !course.goes_on() {
                return;
            }
            match made(address) {
                Ok(namespace) => kept.lock().expect("nobody panics with it").push(namespace),
                Err(_) => course.count("refused namespaces", 1),
            }
        }
    });
    let kept = kept.into_inner().expect("nobody panics with it");
    course.count("namespaces", kept.len() as u64);
    course.in_full_swing();
    while course.goes_on() {
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// A new namespace that the kernel has seen a connection from.
fn made(address: Ipv4Addr) -> io::Result<OwnedFd> {
    let own: OwnedFd = std::fs::File::open("/proc/thread-self/ns/net")?.into();
    enter_new(address)?;
    let new = std::fs::File::open("/proc/thread-self/ns/net")?.into();
    begin_connect(&socket()?, imds())?;
    use std::os::fd::AsFd as _;
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(new)
}

fn v4(address: SocketAddr) -> Option<Ipv4Addr> {
    match address {
        SocketAddr::V4(v4) => Some(*v4.ip()),
        SocketAddr::V6(_) => None,
    }
}

fn interface_request() -> libc::ifreq {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(LOOPBACK) {
        *to = *from as libc::c_char;
    }
    libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: 0 } }
}

fn change(control: &socket2::Socket, call: libc::Ioctl, request: &libc::ifreq) -> io::Result<()> {
    // SAFETY: the request is a whole `ifreq`, which both calls only read.
    let answer = unsafe { libc::ioctl(control.as_raw_fd(), call, std::ptr::from_ref(request)) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

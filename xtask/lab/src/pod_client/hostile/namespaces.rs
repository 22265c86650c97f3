//! Network namespaces of a pod's own, in which it may have whatever address it likes.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsFd as _, OwnedFd},
    sync::Mutex,
    thread,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::time::Instant;

use super::{Course, begin_connect, imds, socket};
use crate::pod_client::attack::sys::enter_new_network;

/// No longer than this, whatever there is by then.
const MOST: Duration = Duration::from_secs(12);
const THREADS: u32 = 2;
const PAUSE: Duration = Duration::from_millis(20);

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
    enter_new_network(address)?;
    let new = std::fs::File::open("/proc/thread-self/ns/net")?.into();
    begin_connect(&socket()?, imds())?;
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(new)
}

fn v4(address: SocketAddr) -> Option<Ipv4Addr> {
    match address {
        SocketAddr::V4(v4) => Some(*v4.ip()),
        SocketAddr::V6(_) => None,
    }
}

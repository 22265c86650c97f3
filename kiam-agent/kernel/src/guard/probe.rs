//! Tests from a pod's network namespace whether the route guard holds, instead of guessing from the CNI's name. CNIs that
//! bypass the node's routing (Cilium's BPF host routing, ipvlan, SR-IOV) bypass its rules as well.

use std::{io, net::Ipv4Addr, ops::ControlFlow, path::Path, time::Duration};

use kiam_common::redirect::{IMDS_PORT, IMDS_V4};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{AddressFamily, SocketAddrV4, SocketFlags, SocketType, connect, socket_with, sockopt},
};

use crate::sys::{
    Walk,
    namespaces::{inside, is_nodes, of_pods},
};
use kiam_core::blocking::Blocking;

/// How long a connect may take.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// The longest search for pods.
const TIME: Duration = Duration::from_secs(10);
/// Pods that are tried before the result is unknown.
const TRIED_PODS: usize = 3;

/// The result of a connect from a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reach {
    /// The node's rules rejected it.
    Holds,
    /// It reached the IMDS, or the network beyond the rules.
    Open,
    /// There was no pod to try from, or no answer.
    Unknown,
}

// === impl Reach ===

impl Reach {
    pub(super) const ALL: [Self; 3] = [Self::Holds, Self::Open, Self::Unknown];

    /// The name in metrics and `/ready`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Open => "open",
            Self::Unknown => "unknown",
        }
    }
}

/// Connects from up to three pods in turn, until one result is known. The socket is the agent's, so that no hook at the
/// pods' cgroup runs for it, but its packets take the pod's route. Blocks for up to a second per pod.
pub(super) fn probe(blocking: &Blocking, cgroup: &Path) -> Reach {
    let mut known = Reach::Unknown;
    let mut tried = 0;
    of_pods(&mut Walk::new(blocking, TIME), cgroup, |namespace| {
        // A namespace that a pod created itself can fake any answer.
        if !is_nodes(namespace) {
            return ControlFlow::Continue(());
        }
        known =
            inside(namespace, || Ok(reach(attempt(IMDS_V4, IMDS_PORT)))).unwrap_or(Reach::Unknown);
        tried += 1;
        if known == Reach::Unknown && tried < TRIED_PODS {
            return ControlFlow::Continue(());
        }
        ControlFlow::Break(())
    });
    known
}

/// Connects and closes. Returns `ETIMEDOUT` after [`PATIENCE`].
fn attempt(address: Ipv4Addr, port: u16) -> io::Result<()> {
    attempt_within(address, port, None)
}

/// As [`attempt`], by packets that may go so many `hops`.
pub(super) fn attempt_within(address: Ipv4Addr, port: u16, hops: Option<u32>) -> io::Result<()> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    if let Some(hops) = hops {
        sockopt::set_ip_ttl(&socket, hops)?;
    }
    match connect(&socket, &SocketAddrV4::new(address, port)) {
        Err(Errno::INPROGRESS) => {}
        immediately => return Ok(immediately?),
    }
    let mut ready = [PollFd::new(&socket, PollFlags::OUT)];
    if poll(&mut ready, Some(&PATIENCE))? == 0 {
        return Err(Errno::TIMEDOUT.into());
    }
    Ok(sockopt::socket_error(&socket)??)
}

/// The [`Reach`] that the outcome of a connect shows.
pub(super) fn reach(outcome: io::Result<()>) -> Reach {
    match outcome.map_err(|error| error.raw_os_error().unwrap_or_default()) {
        Ok(()) | Err(libc::ECONNREFUSED) => Reach::Open,
        Err(libc::EHOSTUNREACH | libc::EACCES) => Reach::Holds,
        Err(_) => Reach::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_classed() {
        let errno = |number| Err(io::Error::from_raw_os_error(number));
        let cases = [
            (Ok(()), Reach::Open),
            (errno(libc::ECONNREFUSED), Reach::Open),
            (errno(libc::EHOSTUNREACH), Reach::Holds),
            (errno(libc::EACCES), Reach::Holds),
            (errno(libc::ETIMEDOUT), Reach::Unknown),
            (errno(libc::ENETUNREACH), Reach::Unknown),
        ];
        for (outcome, expected) in cases {
            let shown = format!("{outcome:?}");
            assert_eq!(reach(outcome), expected, "{shown}");
        }
    }

    #[test]
    fn a_refused_connect_is_told_and_an_open_one_is_too() {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(reach(attempt(Ipv4Addr::LOCALHOST, port)), Reach::Open);
        drop(listener);
        let refused = attempt(Ipv4Addr::LOCALHOST, port);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ECONNREFUSED));
    }
}

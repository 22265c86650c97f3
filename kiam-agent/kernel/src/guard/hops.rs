//! Whether pods' packets pass this node's routing, tried before the guard has rules.
//!
//! A packet that may go one hop alone is dropped by the first router that it meets, which says so by ICMP. Where that
//! router is this node, its routing rules apply to the pod's packets. CNIs that bypass the node's routing (Cilium's BPF host
//! routing, ipvlan, SR-IOV) bypass its rules as well. The kernel looks a route up before it looks at the hops that are
//! left, so that the guard's own rules answer in the same way.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, Ipv4Addr},
    ops::ControlFlow,
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    time::Duration,
};

use kiam_common::redirect::{IMDS_PORT, IMDS_V4};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt::Ipv4RecvErr,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, SendFlags, SocketAddrV4, SocketFlags, SocketType, connect, ipproto, send,
        socket_with, sockopt,
    },
};

use super::probe::{Reach, attempt_within, reach};
use crate::sys::{
    Walk,
    namespaces::{inside, is_nodes, of_pods},
};
use kiam_core::blocking::Blocking;

/// An echo request, whose checksum is that of its only other bytes. Neither the hooks at connect and sendmsg nor rules for the
/// IMDS's port, such as kiam's redirect, apply to it.
const ECHO: [u8; 8] = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
/// How long an answer may take.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How often it is tried: Linux tells each destination of such packets once a second (`net.ipv4.icmp_ratelimit`), and an agent
/// may have tried from the same pod just before.
const TRIES: usize = 2;
/// The longest search for pods.
const TIME: Duration = Duration::from_secs(10);
/// Pods that are tried. More than one, as pods of a node need not have the same kind of network.
const TRIED_PODS: usize = 3;

/// What trying came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passage {
    /// Whether pods' packets pass the node's routing: the worst of what is known.
    pub(crate) reach: Reach,
    /// The pods that were tried.
    pub(crate) pods: usize,
}

/// Tries from up to three pods. One from which packets bypass the node decides: a pod that may send raw packets can forge the
/// router's message, but only for its own network. `node` has the node's addresses. If `hooked`, an agent's hooks answer what
/// this process connects to there.
pub(crate) fn try_from_pods(
    blocking: &Blocking,
    cgroup: &Path,
    node: &HashSet<IpAddr>,
    hooked: bool,
) -> Passage {
    let mut passage = Passage { reach: Reach::Unknown, pods: 0 };
    of_pods(&mut Walk::new(blocking, TIME), cgroup, |namespace| {
        // In a namespace that a pod created itself, the pod itself may be the router.
        if !is_nodes(namespace) {
            return ControlFlow::Continue(());
        }
        passage.pods += 1;
        let one = inside(namespace, || Ok(passes(node, hooked))).unwrap_or(Reach::Unknown);
        passage.reach = worse(passage.reach, one);
        if passage.reach != Reach::Open && passage.pods < TRIED_PODS {
            return ControlFlow::Continue(());
        }
        ControlFlow::Break(())
    });
    passage
}

/// What two pods say together: open if either is, and unknown only if both are.
fn worse(one: Reach, other: Reach) -> Reach {
    match (one, other) {
        (Reach::Open, _) | (_, Reach::Open) => Reach::Open,
        (Reach::Holds, _) | (_, Reach::Holds) => Reach::Holds,
        (Reach::Unknown, Reach::Unknown) => Reach::Unknown,
    }
}

/// In this thread's network namespace: whether packets pass the node with these addresses.
fn passes(node: &HashSet<IpAddr>, hooked: bool) -> Reach {
    match first_router() {
        Ok(Some(router)) if node.contains(&router.into()) => return Reach::Holds,
        _ if hooked => return Reach::Unknown,
        Ok(_) | Err(_) => {}
    }
    // Whatever answers within one hop was reached without this node.
    match reach(attempt_within(IMDS_V4, IMDS_PORT, Some(1))) {
        Reach::Open => Reach::Open,
        Reach::Holds | Reach::Unknown => Reach::Unknown,
    }
}

/// The router that drops a packet to the IMDS after one hop; `None` if nobody says so in time.
fn first_router() -> io::Result<Option<Ipv4Addr>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::ICMP))?;
    sockopt::set_ip_ttl(&socket, 1)?;
    // So errors come with the address of who sent them.
    setsockopt(&socket, Ipv4RecvErr, &true)?;
    connect(&socket, &SocketAddrV4::new(IMDS_V4, 0))?;
    for _ in 0..TRIES {
        send(&socket, &ECHO, SendFlags::empty())?;
        let mut ready = [PollFd::new(&socket, PollFlags::ERR)];
        if poll(&mut ready, Some(&PATIENCE))? > 0 {
            return offender(&socket);
        }
    }
    Ok(None)
}

/// Who sent the ICMP message in the socket's queue of errors; `None` if none is there.
fn offender(socket: &OwnedFd) -> io::Result<Option<Ipv4Addr>> {
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let flags = MsgFlags::MSG_ERRQUEUE;
    // What was sent comes back, too, and nobody needs it.
    let received = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut [], Some(&mut control), flags);
    let received = match received {
        Ok(received) => received,
        Err(nix::errno::Errno::EAGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let router = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4RecvErr(error, Some(address))
            if error.ee_origin == libc::SO_EE_ORIGIN_ICMP =>
        {
            Some(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()))
        }
        _ => None,
    });
    Ok(router)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_whose_packets_bypass_the_node_decides() {
        use Reach::{Holds, Open, Unknown};
        for (one, other, together) in [
            (Holds, Open, Open),
            (Unknown, Open, Open),
            (Open, Holds, Open),
            (Holds, Unknown, Holds),
            (Unknown, Holds, Holds),
            (Unknown, Unknown, Unknown),
        ] {
            assert_eq!(worse(one, other), together, "{one:?} {other:?}");
        }
    }
}

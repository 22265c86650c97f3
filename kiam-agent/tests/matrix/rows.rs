//! The table: each attempt as data, and what must come of it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
};

use lab::{
    AGENT_PORT, IMDS_V4, IMDS_V6, NODE_V4, NODE_V6, has_mptcp,
    pod_client::{
        Attempt,
        attack::{Attack, datagram, frame, raw, stream},
    },
    tells_namespaces_apart,
};

use crate::{
    judge::{Expect, Outcome, State, Verdict},
    scenes,
    stage::{Cast, Stage, Who},
};

/// The metadata service, by each of its forms.
pub(crate) const IMDS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(IMDS_V4, 80));
const MAPPED: SocketAddr = v6(IMDS_V4.to_ipv6_mapped());
const NATIVE: SocketAddr = v6(IMDS_V6);
const NAT64: SocketAddr = v6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, 0xa9fe));
const SIX_TO_FOUR: SocketAddr = v6(Ipv6Addr::new(0x2002, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1));
/// An address that nobody has.
const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 99, 99));
const EPERM: Expect = Expect::Refused(&["EPERM"]);

/// One attempt.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) who: Who,
    pub(crate) act: Act,
    pub(crate) expect: Expect,
    /// Documented as open: nothing closes it.
    pub(crate) open: bool,
    /// Whether it is to the metadata service itself, so that it arrives there when nothing is closed.
    arrives: bool,
}

pub(crate) enum Act {
    /// One step, by a process that tries many.
    Attack(Attack),
    /// Several, with pods that come and go.
    Scene(Box<dyn Fn(&mut Stage<'_>) -> Attempt + Send + Sync>),
}

const fn v6(address: Ipv6Addr) -> SocketAddr {
    SocketAddr::V6(SocketAddrV6::new(address, 80, 0, 0))
}

// === impl Row ===

impl Row {
    fn attack(name: &str, who: Who, attack: Attack, expect: Expect) -> Self {
        let act = Act::Attack(attack);
        Self { name: name.to_owned(), who, act, expect, open: false, arrives: true }
    }

    fn scene(
        name: &str,
        who: Who,
        scene: impl Fn(&mut Stage<'_>) -> Attempt + Send + Sync + 'static,
        expect: Expect,
    ) -> Self {
        let act = Act::Scene(Box::new(scene));
        Self { name: name.to_owned(), who, act, expect, open: false, arrives: false }
    }

    fn open(self) -> Self {
        Self { open: true, ..self }
    }

    fn elsewhere(self) -> Self {
        Self { arrives: false, ..self }
    }

    pub(crate) fn judge(&self, outcome: &Outcome, state: State) -> Verdict {
        if state != State::NoAgent {
            return outcome.judge(self.expect, self.open, state);
        }
        if outcome.packets.is_empty() == self.arrives { Verdict::Wrong } else { Verdict::Right }
    }
}

/// What an ordinary pod can try. Who connects from another's address never hears the answer.
pub(crate) fn of_a_pod(cast: &Cast) -> Vec<Row> {
    pods_rows(cast, Expect::Nothing)
}

/// The same with a listener inside: an address is nobody else's there, so whoever connects gets their own.
pub(crate) fn of_a_pod_with_a_listener_inside(cast: &Cast) -> Vec<Row> {
    pods_rows(cast, Expect::NothingStrange)
}

fn pods_rows(cast: &Cast, forged_source: Expect) -> Vec<Row> {
    let who = Who::Pod;
    let ips = (cast.pod.v4().into(), cast.pod.v6().into());
    let mut rows = vec![the_host()];
    // First, so that it is within the lease of the agent that was killed.
    rows.extend(squatting());
    rows.extend(redirected(who));
    rows.push(stream("V6ONLY, fd00:ec2::254", who, stream::Way::OnlyV6, NATIVE, Expect::Served));
    rows.extend(refused(who));
    rows.extend(raw_sockets(who, ips));
    rows.push(nobodys(who));
    rows.extend(packet_sockets(who, ips));
    let forged = cast.thief.v4().into();
    rows.push(frame("packet, another pod's source", who, frame::Way::Raw, forged, IMDS_V4.into()));
    rows.push(frame("packet, QDISC_BYPASS", who, frame::Way::RawBypass, ips.0, IMDS_V4.into()));
    rows.extend(forgeries(cast, forged_source));
    rows.extend(direct(who));
    rows.push(early(who));
    rows.extend(handovers());
    rows.extend(pods_that_come_and_go());
    rows
}

/// What a pod on the host's network can try, where those are intercepted.
pub(crate) fn of_a_host_network_pod(_: &Cast) -> Vec<Row> {
    let who = Who::HostPod;
    let ips = (NODE_V4.into(), NODE_V6.into());
    let mut rows = vec![the_host()];
    rows.extend(redirected(who));
    rows.extend(refused(who));
    rows.extend(raw_sockets(who, ips));
    rows.push(nobodys(who));
    rows.extend(packet_sockets(who, ips));
    rows.push(frame("packet, nobody's source", who, frame::Way::Raw, NOBODY, IMDS_V4.into()));
    let bypass = frame("packet, QDISC_BYPASS", who, frame::Way::RawBypass, ips.0, IMDS_V4.into());
    rows.push(bypass.open());
    rows.push(stream("TCP_REPAIR", who, stream::Way::Repair, IMDS, Expect::Nothing));
    rows.extend(direct(who));
    rows.push(early(who));
    rows
}

/// The proof that the lab counts: the host is not touched.
fn the_host() -> Row {
    stream("(the host itself)", Who::Host, stream::Way::Connect, IMDS, Expect::Node)
}

fn redirected(who: Who) -> Vec<Row> {
    use stream::Way;
    let cases = [
        ("connect", Way::Connect, IMDS),
        ("connect, non-blocking", Way::NonBlocking, IMDS),
        ("connect, v4-mapped", Way::Connect, MAPPED),
        ("connect, fd00:ec2::254", Way::Connect, NATIVE),
        ("TCP fast open, sendto", Way::FastOpenSend, IMDS),
        ("TCP fast open, sendto, v4-mapped", Way::FastOpenSend, MAPPED),
        ("TCP fast open, connect", Way::FastOpenConnect, IMDS),
        ("io_uring", Way::IoUring, IMDS),
        ("io_uring, v4-mapped", Way::IoUring, MAPPED),
        ("MPTCP", Way::Mptcp, IMDS),
        ("MPTCP, v4-mapped", Way::Mptcp, MAPPED),
        ("MPTCP, fd00:ec2::254", Way::Mptcp, NATIVE),
    ];
    let (io_uring, mptcp) = (io_uring_is_allowed(), has_mptcp());
    if !mptcp {
        println!("MPTCP is left out, as the kernel was built without it");
    }
    let allowed = |(_, way, _): &(_, Way, _)| match way {
        Way::IoUring => io_uring,
        Way::Mptcp => mptcp,
        _ => true,
    };
    let cases = cases.into_iter().filter(allowed);
    cases.map(|(name, way, to)| stream(name, who, way, to, Expect::Served)).collect()
}

fn io_uring_is_allowed() -> bool {
    // Absent before kernel 6.6, which always allowed it.
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let allowed = disabled.trim() != "2";
    if !allowed {
        println!("io_uring is left out: kernel.io_uring_disabled is 2");
    }
    allowed
}

fn refused(who: Who) -> Vec<Row> {
    let port = |mut to: SocketAddr| {
        to.set_port(8080);
        stream(&format!("port 8080 of {}", to.ip()), who, stream::Way::Connect, to, EPERM)
    };
    let translated = [("NAT64 form", NAT64), ("6to4 form", SIX_TO_FOUR)];
    let translated =
        translated.map(|(name, to)| stream(name, who, stream::Way::Connect, to, EPERM).elsewhere());
    use datagram::Way;
    let datagrams = [
        ("UDP, connect", Way::Connect, IMDS),
        ("UDP, sendto", Way::SendTo, IMDS),
        ("UDP, sendmmsg", Way::SendMany, IMDS),
        ("UDP, connect, v4-mapped", Way::Connect, MAPPED),
        ("UDP, sendto, v4-mapped", Way::SendTo, MAPPED),
        ("UDP, connect, fd00:ec2::254", Way::Connect, NATIVE),
        ("UDP, sendto, fd00:ec2::254", Way::SendTo, NATIVE),
        ("UDP, sendmmsg, fd00:ec2::254", Way::SendMany, NATIVE),
    ];
    let datagrams = datagrams.map(|(name, way, to)| datagram(name, who, way, to, EPERM));
    let pings = [
        ("ping socket", Way::Ping, IMDS),
        ("ping socket, connected", Way::PingConnected, IMDS),
        ("ping socket, fd00:ec2::254", Way::Ping, NATIVE),
    ];
    let pings = pings.map(|(name, way, to)| datagram(name, who, way, to, Expect::Nothing));
    [IMDS, MAPPED, NATIVE]
        .map(port)
        .into_iter()
        .chain(translated)
        .chain(datagrams)
        .chain(pings)
        .collect()
}

/// `ips` are the sources that the packets name, by family.
fn raw_sockets(who: Who, ips: (IpAddr, IpAddr)) -> Vec<Row> {
    use raw::Way;
    let cases = [
        ("raw, echo", Way::Echo, false),
        ("raw, SYN by sendto", Way::SynSendTo, false),
        ("raw, SYN by connect", Way::SynConnect, false),
        ("raw, SYN with IP_HDRINCL", Way::SynHeader, false),
        ("raw, echo, IPv6", Way::Echo, true),
        ("raw, SYN by sendto, IPv6", Way::SynSendTo, true),
        ("raw, SYN with IPV6_HDRINCL", Way::SynHeader, true),
    ];
    let row = |(name, way, six)| match six {
        false => raw(name, who, way, ips.0, IMDS_V4.into()),
        true => raw(name, who, way, ips.1, IMDS_V6.into()),
    };
    cases.map(row).into()
}

fn nobodys(who: Who) -> Row {
    raw("raw, SYN with nobody's source", who, raw::Way::SynHeader, NOBODY, IMDS_V4.into())
}

fn packet_sockets(who: Who, ips: (IpAddr, IpAddr)) -> Vec<Row> {
    use frame::Way;
    vec![
        frame("packet, SOCK_DGRAM", who, Way::Dgram, ips.0, IMDS_V4.into()),
        frame("packet, SOCK_RAW", who, Way::Raw, ips.0, IMDS_V4.into()),
        frame("packet, SOCK_DGRAM, IPv6", who, Way::Dgram, ips.1, IMDS_V6.into()),
        frame("packet, SOCK_RAW, IPv6", who, Way::Raw, ips.1, IMDS_V6.into()),
    ]
}

/// What CAP_NET_ADMIN lets a pod do.
fn forgeries(cast: &Cast, forged_source: Expect) -> Vec<Row> {
    use stream::Way;
    let victim = SocketAddr::from((cast.pod.v4(), 40_000));
    let from = |name, way, from| {
        let attack = Attack::Stream { way, to: IMDS, from: Some(from) };
        Row::attack(name, Who::Thief, attack, forged_source)
    };
    vec![
        stream("TCP_REPAIR", Who::Pod, Way::Repair, IMDS, Expect::Nothing),
        from("another pod's address and port", Way::Connect, victim),
        from("IP_TRANSPARENT, another pod's address", Way::Transparent, victim),
        Row::scene(
            "… while that pod asks from the same port",
            Who::Pod,
            move |stage| scenes::forged_meanwhile(stage, victim),
            Expect::NothingStrange,
        ),
    ]
}

fn direct(who: Who) -> Vec<Row> {
    let ports = [
        ("the agent's port", SocketAddr::from((NODE_V4, AGENT_PORT))),
        ("the agent's port, v4-mapped", SocketAddr::from((NODE_V4.to_ipv6_mapped(), AGENT_PORT))),
    ];
    let way = stream::Way::Connect;
    let own = ports.map(|(name, to)| stream(name, who, way, to, EPERM).elsewhere());
    // The listener drops who has not been attested.
    let unheard = Expect::Refused(&["ETIMEDOUT", "ECONNREFUSED"]);
    let host = stream("the agent's port, from the host", Who::Host, way, ports[0].1, unheard);
    own.into_iter().chain([host.elsewhere()]).collect()
}

fn squatting() -> Vec<Row> {
    let any = (Ipv4Addr::UNSPECIFIED, AGENT_PORT).into();
    let any_v6 = (Ipv6Addr::UNSPECIFIED, AGENT_PORT).into();
    let node = (NODE_V4, AGENT_PORT).into();
    let cases: [(&str, SocketAddr, bool); 4] = [
        ("squatting on the node's address", node, false),
        ("squatting on 0.0.0.0", any, false),
        ("squatting on [::]", any_v6, false),
        ("squatting with SO_REUSEPORT", node, true),
    ];
    let refused = Expect::Refused(&["EPERM", "EADDRINUSE"]);
    cases
        .map(|(name, at, reuse)| {
            Row::scene(name, Who::Pod, move |stage| scenes::squat(stage, at, reuse), refused)
        })
        .into()
}

fn early(who: Who) -> Row {
    let scene = move |stage: &mut Stage<'_>| stage.ask_early(who);
    Row::scene("connected before the attach", who, scene, Expect::Nothing)
}

fn handovers() -> Vec<Row> {
    // Where the kernel does not know whose a namespace is, the agent finds out by the source address.
    let strangers = if tells_namespaces_apart().unwrap() { EPERM } else { Expect::Rejected };
    vec![
        Row::scene("moved to another pod's cgroup", Who::Pod, scenes::moved_to_sibling, strangers),
        Row::scene("moved to the host's cgroup", Who::Pod, scenes::moved_out, strangers),
        Row::scene("moved in with a socket", Who::Pod, scenes::moved_in, Expect::Nothing),
        Row::scene("in the host's cgroup", Who::Pod, scenes::outside, Expect::Nothing),
        Row::scene(
            "another pod's socket (SCM_RIGHTS)",
            Who::Pod,
            |stage| scenes::passed(stage, Who::Thief),
            strangers,
        ),
        Row::scene(
            "the host's socket (SCM_RIGHTS)",
            Who::Pod,
            |stage| scenes::passed(stage, Who::Host),
            Expect::Nothing,
        )
        .open(),
    ]
}

fn pods_that_come_and_go() -> Vec<Row> {
    let just_come = if tells_namespaces_apart().unwrap() { Expect::Known } else { Expect::Served };
    vec![
        Row::scene("a cgroup named as another pod's", Who::Pod, scenes::disguised, Expect::Served),
        Row::scene("two pods with one IP: the first", Who::Pod, scenes::twin, Expect::Served),
        Row::scene(
            "two pods with one IP: the second",
            Who::Thief,
            scenes::second_twin,
            Expect::NothingStrange,
        ),
        Row::scene("a pod that has just come", Who::Pod, scenes::just_come, just_come),
        Row::scene(
            "an IP used again, the watch stalled",
            Who::Thief,
            scenes::address_used_again,
            Expect::NothingStrange,
        ),
        Row::scene("while another pod floods", Who::Pod, scenes::flooded, Expect::Served),
    ]
}

fn stream(name: &str, who: Who, way: stream::Way, to: SocketAddr, expect: Expect) -> Row {
    Row::attack(name, who, Attack::Stream { way, to, from: None }, expect)
}

fn datagram(name: &str, who: Who, way: datagram::Way, to: SocketAddr, expect: Expect) -> Row {
    Row::attack(name, who, Attack::Datagram { way, to }, expect)
}

fn raw(name: &str, who: Who, way: raw::Way, from: IpAddr, to: IpAddr) -> Row {
    Row::attack(name, who, Attack::Raw { way, from, to }, Expect::Nothing)
}

fn frame(name: &str, who: Who, way: frame::Way, from: IpAddr, to: IpAddr) -> Row {
    Row::attack(name, who, Attack::Frame { way, from, to, interface: None }, Expect::Nothing)
}

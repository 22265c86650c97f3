//! The kernel programs on the kernel: what becomes of pods' connects, and who is attested.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    thread,
};

use kiam_common::{counters::VerdictReason, redirect::Target};
use kiam_core::{blocking::Blocking, pods::PodUid};
use kiam_kernel::{
    guard::GuardConfig,
    identity::CgroupPaths,
    intercept::{Config, Interception, InterceptionParts, Lease, Mode, own_namespace, uninstall},
    sys::cookie_of,
};
use lab::{
    Attacker, Cgroup, IMDS_V4, IMDS_V6, Lab, LabPod, Layout, NODE_V4, Node, PodSpec, client_binary,
    eventually,
    fake::imds::NODE_ACCESS_KEY,
    pod_client::{
        Options, Via,
        attack::{Attack, raw, stream::Way},
    },
};

const PORT: u16 = 3100;

const IMDS: (Ipv4Addr, u16) = (IMDS_V4, 80);

/// Sends by a raw socket; what the kernel says if it denies that.
fn ping(pod: &LabPod) -> Option<String> {
    let (from, to) = (pod.v4().into(), IMDS_V4.into());
    let ping = Attack::Raw { way: raw::Way::Echo, from, to };
    pod.attacker().unwrap().attempt(ping, 1000).unwrap().error
}

/// Has `attacker` open `count` connections; how many it got, and how many were denied.
fn open(attacker: &mut Attacker, count: u32) -> String {
    let attempt = attacker.attempt(Attack::Hold { to: IMDS.into(), count }, 5000).unwrap();
    attempt.error.unwrap_or(attempt.body)
}

/// Opens ten connections and closes them.
fn few(pod: &LabPod) -> String {
    open(&mut pod.attacker().unwrap(), 10)
}

/// Opens connections in a process in `cgroup`, on the pod's network, which holds them.
fn hold(pod: &LabPod, cgroup: &Cgroup, count: u32) -> (Attacker, String) {
    let mut attacker = pod.attacker_in(cgroup).unwrap();
    let counts = open(&mut attacker, count);
    (attacker, counts)
}

/// Of the test's own thread.
fn blocking() -> Blocking {
    Blocking::here().expect("no runtime runs on it")
}

fn target() -> Target {
    Target { v4: NODE_V4.octets(), v4_port: PORT, ..Target::default() }
}

/// Loads and attaches in the node's namespace, as the agent does.
fn attach(node: &Node, bpffs: &Path) -> InterceptionParts {
    attach_as(node, config(node, bpffs))
}

fn config(node: &Node, bpffs: &Path) -> Config {
    Config::new(Some(node.kubepods().to_owned()), bpffs.to_owned())
}

fn attach_as(node: &Node, config: Config) -> InterceptionParts {
    let load = || {
        Interception::load(&blocking(), &config, target())
            .and_then(|loaded| loaded.attach(&blocking(), &[]))
    };
    node.netns().enter(load).expect("a namespace can be entered").expect("the programs load")
}

/// The cookie of the pod's network namespace, by a program where the kernel does not tell it.
fn cookie(parts: &InterceptionParts, pod: &LabPod) -> u64 {
    let told = || UdpSocket::bind("0.0.0.0:0").and_then(cookie_of);
    let cookie = || told().or_else(|_| own_namespace(&parts.cgroup));
    pod.netns().enter(cookie).expect("a namespace can be entered").expect("a program sees it")
}

fn options(to: IpAddr) -> Options {
    Options { to: Some(to), timeout_ms: 300, ..Options::get("/latest/meta-data/") }
}

fn error(pod: &LabPod, options: &Options) -> String {
    pod.ask_once(options).expect("the pod's client runs").error.unwrap_or_default()
}

#[test]
fn connects_are_redirected_denied_or_left_alone_and_attested() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let pins = node.bpffs().join("kiam");
    let mut parts = attach(&node, &pins);

    let imds = options(IMDS_V4.into());
    assert_eq!(error(&pod, &imds), "EPERM", "without a lease");
    parts.lease.renew().unwrap();
    assert_eq!(error(&pod, &imds), "ECONNREFUSED", "with a lease and no listener");
    let cases = [
        (Options { port: 8080, ..imds.clone() }, "EPERM", "another port"),
        (Options { port: 8080, ..options(IMDS_V6.into()) }, "EPERM", "another port, IPv6"),
        (Options { port: 8080, via: Via::V4Mapped, ..imds.clone() }, "EPERM", "another, v4-mapped"),
        (Options { via: Via::Udp, ..imds.clone() }, "EPERM", "UDP"),
        (options(IMDS_V6.into()), "ECONNREFUSED", "IPv6"),
        (options(IMDS_V4.to_ipv6_mapped().into()), "ECONNREFUSED", "v4-mapped"),
        (options("64:ff9b::a9fe:a9fe".parse().unwrap()), "EPERM", "NAT64"),
    ];
    for (options, expected, what) in cases {
        assert_eq!(error(&pod, &options), expected, "{what}");
    }

    let address = SocketAddr::from((NODE_V4, PORT));
    let listener: TcpListener = node.netns().listen(address).unwrap();
    // Learned before the client waits, which takes its time.
    let netns = cookie(&parts, &pod);
    for to in [IpAddr::from(IMDS_V4), IMDS_V6.into(), IMDS_V4.to_ipv6_mapped().into()] {
        let client = thread::scope(|scope| {
            let asking = scope.spawn(|| error(&pod, &options(to)));
            let (stream, peer) = listener.accept().unwrap();
            assert_eq!(peer.ip().to_canonical(), IpAddr::from(pod.v4()));
            let take = || parts.flows.take(netns, peer, stream.local_addr().unwrap());
            let found = take().unwrap();
            assert_eq!(take().unwrap(), None, "an entry is taken once");
            asking.join().unwrap();
            found
        });
        let entry = client.unwrap_or_else(|| panic!("no entry for {to}"));
        let paths = CgroupPaths::new(parts.cgroup.clone());
        assert_eq!(paths.pod(entry.cgroup), Ok(PodUid::new(pod.uid())), "{to}");
    }
    assert_eq!(parts.verdicts.count(VerdictReason::Redirected), 6);
    assert_eq!(parts.verdicts.count(VerdictReason::Datagram), 1);
    assert!(!uninstall(&pins).unwrap().is_empty());
    assert!(uninstall(&pins).unwrap().is_empty(), "idempotent");
}

#[test]
fn mptcp_is_redirected_and_tcp_sees_the_address_it_asked_for() {
    if lab::no_mptcp() {
        return;
    }
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    parts.lease.renew().unwrap();
    let listener = node.netns().listen(SocketAddr::from((NODE_V4, PORT))).unwrap();
    // An MPTCP socket shows its first subflow's peer: the record is with the subflow, which connected.
    for (way, shown) in [(Way::Connect, "169.254.169.254:80"), (Way::Mptcp, "10.77.0.1:3100")] {
        let mut attacker = pod.attacker().unwrap();
        thread::scope(|scope| {
            let connecting = scope.spawn(|| attacker.must(Attack::Keep { way, to: IMDS.into() }));
            let (stream, peer) = listener.accept().unwrap();
            let local = stream.local_addr().unwrap();
            let entry = parts.flows.take(cookie(&parts, &pod), peer, local).unwrap();
            assert!(entry.is_some(), "{way:?} has no entry");
            connecting.join().unwrap().unwrap();
        });
        let ends = attacker.attempt(Attack::Ends, 1000).unwrap().body;
        assert_eq!(ends.split_once(' ').unwrap().1, shown, "{way:?}");
    }
}

/// As an agent that answers nobody: keeps the lease, and whatever it accepts, until the tests end.
fn accept_all(node: &Node, mut lease: Lease) {
    let listener = node.netns().listen(SocketAddr::from((NODE_V4, PORT))).expect("it is free");
    lease.renew().expect("the map is there");
    thread::spawn(move || listener.incoming().collect::<Vec<_>>());
    thread::spawn(move || {
        while lease.renew().is_ok() {
            thread::sleep(Lease::RENEWAL);
        }
    });
}

#[test]
fn all_containers_of_a_pod_share_its_quota_and_no_other_pod_does() {
    if lab::skip!() {
        return;
    }
    let layouts = [Layout::SystemdGuaranteed, Layout::SystemdBurstable, Layout::CgroupfsBurstable];
    for layout in layouts {
        let node = Node::start().unwrap();
        let spec = |name| PodSpec::new("default", name).layout(layout).with_uid().unwrap();
        let [flooding, working] = ["a", "b"].map(|name| node.pod(spec(name)).unwrap());
        let parts = attach(&node, &node.bpffs().join("kiam"));
        accept_all(&node, parts.lease);
        let containers = ["c1", "c2", "c3/of-its-own"].map(|id| {
            Cgroup::create(node.kubepods().join(layout.container(flooding.uid(), id))).unwrap()
        });
        let counts = containers.each_ref().map(|c| hold(&flooding, c, 100));
        let counts = counts.each_ref().map(|(_, counts)| counts.as_str());
        assert_eq!(counts, ["100 0", "100 0", "56 44"], "{layout:?}");
        assert_eq!(few(&working), "10 0", "{layout:?}");
        assert_eq!(parts.verdicts.count(VerdictReason::Quota), 44, "{layout:?}");
    }
}

#[test]
fn a_qos_class_that_comes_later_shares_a_quota_until_it_is_marked() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    accept_all(&node, parts.lease);
    // The second class is another cgroup of the same name.
    for _ in 0..2 {
        assert!(parts.programs.knows_classes(&blocking()));
        let class = Cgroup::create(node.kubepods().join("kubepods-burstable.slice")).unwrap();
        assert!(!parts.programs.knows_classes(&blocking()));
        let spec = |name| PodSpec::new("default", name).with_uid().unwrap();
        let [flooding, working] = ["a", "b"].map(|name| node.pod(spec(name)).unwrap());
        let (held, counts) = hold(&flooding, flooding.cgroup(), 300);
        assert_eq!(counts, "256 44");
        assert_eq!(few(&working), "EPERM", "nothing is beyond the quota meanwhile");
        parts.programs.follow_classes(&blocking()).unwrap();
        assert!(parts.programs.knows_classes(&blocking()));
        assert_eq!(few(&working), "10 0");
        drop(held);
        let (_held, counts) = hold(&flooding, flooding.cgroup(), 300);
        assert_eq!(counts, "256 44");
        assert_eq!(few(&working), "10 0");
        drop((flooding, working, class));
        parts.programs.follow_classes(&blocking()).unwrap();
    }
}

#[test]
fn one_pods_flood_is_bounded_and_leaves_others_alone() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let [flooding, working] =
        ["a", "b"].map(|name| node.pod(PodSpec::new("default", name).with_uid().unwrap()).unwrap());
    let parts = attach(&node, &node.bpffs().join("kiam"));
    accept_all(&node, parts.lease);
    let (held, counts) = hold(&flooding, flooding.cgroup(), 300);
    assert_eq!(counts, "256 44");
    assert_eq!(parts.verdicts.count(VerdictReason::Quota), 44);
    assert_eq!(few(&working), "10 0");
    // Its connections close, and their part of the quota is free again.
    drop(held);
    assert_eq!(few(&flooding), "10 0");
}

#[test]
fn namespaces_that_a_pod_makes_share_its_quota() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let [flooding, working] =
        ["a", "b"].map(|name| node.pod(PodSpec::new("default", name).with_uid().unwrap()).unwrap());
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    parts.lease.renew().unwrap();
    // Each has a user namespace of its own too, and connections that come to nobody.
    let flood = || {
        let mut attackers = Vec::new();
        let mut all = [0_u32; 2];
        for number in 1..5 {
            let setup = format!(
                "ip link set lo up; ip addr add 10.9.9.{number}/32 dev lo; \
                 ip route add default dev lo; exec \"$@\""
            );
            let mut command = flooding.command("unshare").unwrap();
            command.args(["-Urn", "sh", "-c", &setup, "sh"]).arg(client_binary().unwrap());
            let mut attacker = Attacker::start_by(command).unwrap();
            let counts = open(&mut attacker, 100);
            let counts = if counts == "EPERM" { "0 100".to_owned() } else { counts };
            for (sum, count) in all.iter_mut().zip(counts.split(' ')) {
                *sum += count.parse::<u32>().unwrap();
            }
            attackers.push(attacker);
        }
        all
    };
    assert_eq!(flood(), [256, 144]);
    assert_eq!(parts.verdicts.count(VerdictReason::Quota), 144);
    // They ended, and each count is free again, under whatever namespace it was made.
    assert_eq!(flood(), [256, 144]);
    assert_eq!(error(&working, &options(IMDS_V4.into())), "ECONNREFUSED");
}

#[test]
fn connections_that_close_while_observed_count_no_more() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let pins = node.bpffs().join("kiam");
    let parts = attach(&node, &pins);
    accept_all(&node, parts.lease);
    let (held, counts) = hold(&pod, pod.cgroup(), 200);
    assert_eq!(counts, "200 0");
    let _observing = attach_as(&node, Config { mode: Mode::Observe, ..config(&node, &pins) });
    drop(held);
    let mut parts = attach(&node, &pins);
    parts.lease.renew().unwrap();
    let (_held, counts) = hold(&pod, pod.cgroup(), 200);
    assert_eq!(counts, "200 0");
}

#[test]
fn a_close_finds_its_entry_though_the_source_has_changed() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    parts.lease.renew().unwrap();
    pod.netns().sysctl("ipv4/ip_dynaddr", "1").unwrap();
    let route = "route replace 10.77.0.1/32 dev lo src";
    let pods = pod.netns();
    pods.ip(&format!(
        "link set lo up\naddr add 10.9.9.1/32 dev lo\naddr add 10.9.9.2/32 dev lo\n{route} 10.9.9.1\n"
    ))
    .unwrap();
    let mut attacker = pod.attacker().unwrap();
    attacker.must(Attack::Hold { to: IMDS.into(), count: 1 }).unwrap();
    let mut own = || -> SocketAddr {
        let ends = attacker.attempt(Attack::Ends, 1000).unwrap().body;
        ends.split_once(' ').unwrap().0.parse().unwrap()
    };
    let before = own();
    // Nobody answers, and at a retransmission the kernel finds the source's address gone.
    pods.ip(&format!("{route} 10.9.9.2\naddr del 10.9.9.1/32 dev lo\n")).unwrap();
    eventually("another source", || own() != before);
    assert_eq!(own().ip(), IpAddr::from([10, 9, 9, 2]));
    drop(attacker);
    let port = before.port();
    let peer = SocketAddr::from(([10, 9, 9, 1], port));
    let local = SocketAddr::from((NODE_V4, PORT));
    assert_eq!(parts.flows.take_last(peer, local).unwrap(), None);
    assert_eq!(parts.flows.take(cookie(&parts, &pod), peer, local).unwrap(), None);
}

#[test]
fn packets_that_pods_send_past_connect_are_dropped_by_the_guard_and_reach_the_imds_without_it() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = lab.pod(PodSpec::new("default", "a")).unwrap();
    let host_pod = lab.pod(PodSpec::new("kube-system", "b").host_network()).unwrap();
    let config = config(&lab.node, &lab.pins());
    let guard = GuardConfig { skb: true, ..GuardConfig::default() };
    let mut parts = attach_as(&lab.node, Config { guard, ..config.clone() });
    parts.lease.renew().unwrap();
    let before = lab.imds.packets();
    assert_eq!(ping(&pod).as_deref(), Some("EPERM"));
    assert_eq!(ping(&host_pod).as_deref(), Some("EPERM"));
    assert_eq!(lab.imds.packets(), before);
    assert_eq!(parts.verdicts.count(VerdictReason::Guard), 2);
    // What connect lets through, the guard does too.
    for attempt in
        [host_pod.credentials().unwrap(), lab.node.ask_once(&Options::default()).unwrap()]
    {
        assert_eq!(attempt.field("AccessKeyId").as_deref(), Some(NODE_ACCESS_KEY), "{attempt:?}");
    }
    // While it lives, an agent keeps what it attached.
    drop(parts);
    let parts = attach_as(&lab.node, config);
    let before = lab.imds.packets();
    // A link that was pinned ends a grace period of RCU after its pin on old kernels, of which 5.10 is one.
    eventually("the guard is gone", || ping(&pod).is_none());
    assert_ne!(lab.imds.packets(), before);
    let dropped = parts.verdicts.count(VerdictReason::Guard);
    assert_eq!(ping(&pod), None);
    assert_eq!(parts.verdicts.count(VerdictReason::Guard), dropped);
}

#[test]
fn programs_that_come_above_the_pods_cgroup_turn_the_guard_on() {
    let Some(Lab { node, .. }) = lab::node_test!() else { return };
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    assert!(!parts.guards_packets);
    assert!(!parts.programs.follow_ancestors().unwrap(), "nothing is above");
    assert_eq!(ping(&pod), None);
    // What a socket load balancer does: programs at a cgroup above, which run after the others.
    let above = Config::new(Some(node.root_cgroup().to_owned()), node.bpffs().join("other"));
    let above = attach_as(&node, above);
    assert!(parts.programs.follow_ancestors().unwrap());
    assert!(!parts.programs.follow_ancestors().unwrap(), "once");
    assert_eq!(ping(&pod).as_deref(), Some("EPERM"));
    drop(above);
    // A later start finds them by itself.
    let parts = attach(&node, &node.bpffs().join("kiam"));
    assert!(parts.guards_packets);
}

//! The kernel programs on the kernel: what becomes of pods' connects, and who is attested.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    process::{Child, Stdio},
    thread,
};

use kiam_common::{counters::VerdictReason, redirect::Target};
use kiam_core::{blocking::Blocking, pods::PodUid};
use kiam_kernel::{
    guard::GuardConfig,
    identity::CgroupPaths,
    intercept::{Config, Interception, InterceptionParts, Lease, Mode, uninstall},
    sys::cookie_of,
};
use lab::{
    Cgroup, IMDS_V4, IMDS_V6, Lab, LabPod, Layout, NODE_V4, Node, PodSpec,
    fake::imds::NODE_ACCESS_KEY,
    pod_client::{Options, Via},
    skip,
};

const PORT: u16 = 3100;

/// Opens ten connections; how many it got, and how many were denied.
const FEW: &str = "import socket\n\
    held=[];denied=0\n\
    for _ in range(10):\n\
    \x20s=socket.socket();s.settimeout(5)\n\
    \x20try: s.connect(('169.254.169.254',80));held.append(s)\n\
    \x20except PermissionError: denied+=1\n\
    print(len(held),denied)";

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

/// The cookie of the pod's network namespace.
fn cookie(pod: &LabPod) -> u64 {
    let cookie = || UdpSocket::bind("0.0.0.0:0").and_then(cookie_of);
    pod.netns().enter(cookie).expect("a namespace can be entered").expect("the kernel tells it")
}

fn options(to: IpAddr) -> Options {
    Options { to: Some(to), timeout_ms: 300, ..Options::get("/latest/meta-data/") }
}

fn error(pod: &LabPod, options: &Options) -> String {
    pod.ask_once(options).expect("the pod's client runs").error.unwrap_or_default()
}

#[test]
fn connects_are_redirected_denied_or_left_alone_and_attested() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let pins = node.bpffs().join("kiam");
    let mut parts = attach(&node, &pins);

    let imds = options(IMDS_V4.into());
    assert_eq!(error(&pod, &imds), "EPERM", "without a lease");
    parts.lease.renew().unwrap();
    assert_eq!(error(&pod, &imds), "ECONNREFUSED", "with a lease and no listener");
    let cases = [
        (Options { port: 8080, ..imds.clone() }, "EPERM", "another port"),
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
    for to in [IpAddr::from(IMDS_V4), IMDS_V6.into(), IMDS_V4.to_ipv6_mapped().into()] {
        let client = thread::scope(|scope| {
            let asking = scope.spawn(|| error(&pod, &options(to)));
            let (stream, peer) = listener.accept().unwrap();
            assert_eq!(peer.ip().to_canonical(), IpAddr::from(pod.v4()));
            let take = || parts.flows.take(cookie(&pod), peer, stream.local_addr().unwrap());
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
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    parts.lease.renew().unwrap();
    let listener = node.netns().listen(SocketAddr::from((NODE_V4, PORT))).unwrap();
    // An MPTCP socket shows its first subflow's peer: the record is with the subflow, which connected.
    let cases = [(6, "TCP", "('169.254.169.254', 80)"), (262, "MPTCP", "('10.77.0.1', 3100)")];
    for (protocol, what, shown) in cases {
        let script = format!(
            "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_STREAM,{protocol})\n\
             s.settimeout(5)\ns.connect(('169.254.169.254',80))\nprint(s.getpeername())\ns.recv(1)"
        );
        let (entry, peer) = thread::scope(|scope| {
            let asking = scope.spawn(|| pod.python(&script).unwrap());
            let (stream, peer) = listener.accept().unwrap();
            let local = stream.local_addr().unwrap();
            let entry = parts.flows.take(cookie(&pod), peer, local).unwrap();
            drop(stream);
            (entry, asking.join().unwrap())
        });
        assert!(entry.is_some(), "{what} has no entry");
        assert_eq!(peer, shown, "{what}");
    }
}

/// Connections that a pod holds; Drop closes them.
struct Held(Child);

impl Held {
    /// Has a process in `cgroup`, on `pod`'s network, open `count` connections; also how many it got, and how many
    /// were denied.
    fn open(pod: &LabPod, cgroup: &Cgroup, count: u32) -> (Self, String) {
        let script = format!(
            "import resource,socket,sys\n\
             resource.setrlimit(resource.RLIMIT_NOFILE,(4096,4096))\n\
             held=[];denied=0\n\
             for _ in range({count}):\n\
             \x20s=socket.socket();s.settimeout(5)\n\
             \x20try: s.connect(('169.254.169.254',80));held.append(s)\n\
             \x20except PermissionError: denied+=1\n\
             print(len(held),denied,flush=True)\n\
             sys.stdin.read()"
        );
        let mut python = pod.netns().command("python3");
        cgroup.adopt(&mut python).expect("the cgroup is there");
        python.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = python.spawn().expect("python3 runs");
        let mut counts = String::new();
        let output = child.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut counts).expect("it prints a line");
        (Self(child), counts.trim().to_owned())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().expect("it ends with its input");
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
        let counts = containers.each_ref().map(|c| Held::open(&flooding, c, 100));
        let counts = counts.each_ref().map(|(_, counts)| counts.as_str());
        assert_eq!(counts, ["100 0", "100 0", "56 44"], "{layout:?}");
        assert_eq!(working.python(FEW).unwrap(), "10 0", "{layout:?}");
        assert_eq!(parts.verdicts.count(VerdictReason::Quota), 44, "{layout:?}");
    }
}

#[test]
fn a_qos_class_that_comes_later_shares_a_quota_until_it_is_marked() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    accept_all(&node, parts.lease);
    // The second class is another cgroup of the same name.
    for _ in 0..2 {
        assert!(parts.programs.knows_classes(&blocking()));
        let class = Cgroup::create(node.kubepods().join("kubepods-burstable.slice")).unwrap();
        assert!(!parts.programs.knows_classes(&blocking()));
        let spec = |name| PodSpec::new("default", name).with_uid().unwrap();
        let [flooding, working] = ["a", "b"].map(|name| node.pod(spec(name)).unwrap());
        let (held, counts) = Held::open(&flooding, flooding.cgroup(), 300);
        assert_eq!(counts, "256 44");
        assert_eq!(working.python(FEW).unwrap(), "0 10", "nothing is beyond the quota meanwhile");
        parts.programs.follow_classes(&blocking()).unwrap();
        assert!(parts.programs.knows_classes(&blocking()));
        assert_eq!(working.python(FEW).unwrap(), "10 0");
        drop(held);
        let (_held, counts) = Held::open(&flooding, flooding.cgroup(), 300);
        assert_eq!(counts, "256 44");
        assert_eq!(working.python(FEW).unwrap(), "10 0");
        drop((flooding, working, class));
        parts.programs.follow_classes(&blocking()).unwrap();
    }
}

#[test]
fn one_pods_flood_is_bounded_and_leaves_others_alone() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let [flooding, working] =
        ["a", "b"].map(|name| node.pod(PodSpec::new("default", name).with_uid().unwrap()).unwrap());
    let parts = attach(&node, &node.bpffs().join("kiam"));
    accept_all(&node, parts.lease);
    let (held, counts) = Held::open(&flooding, flooding.cgroup(), 300);
    assert_eq!(counts, "256 44");
    assert_eq!(parts.verdicts.count(VerdictReason::Quota), 44);
    assert_eq!(working.python(FEW).unwrap(), "10 0");
    // Its connections close, and their part of the quota is free again.
    drop(held);
    assert_eq!(flooding.python(FEW).unwrap(), "10 0");
}

#[test]
fn namespaces_that_a_pod_makes_share_its_quota() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let [flooding, working] =
        ["a", "b"].map(|name| node.pod(PodSpec::new("default", name).with_uid().unwrap()).unwrap());
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    parts.lease.renew().unwrap();
    // No privilege is needed: each has a user namespace of its own, and connections that come to nobody.
    let inside = "import socket,subprocess,sys\n\
        subprocess.check_call(sys.argv[1],shell=True)\n\
        held=[];denied=0\n\
        for _ in range(100):\n\
        \x20s=socket.socket();s.setblocking(False)\n\
        \x20try: s.connect(('169.254.169.254',80))\n\
        \x20except BlockingIOError: held.append(s)\n\
        \x20except PermissionError: denied+=1\n\
        print(len(held),denied,flush=True)\n\
        sys.stdin.read()";
    let script = format!(
        "import subprocess\n\
         nobody=['setpriv','--reuid=65534','--regid=65534','--clear-groups','unshare','-Urn']\n\
         children=[];held=denied=0\n\
         for number in range(1,5):\n\
         \x20setup=f'ip link set lo up;ip addr add 10.9.9.{{number}}/32 dev lo;ip route add default dev lo'\n\
         \x20c=subprocess.Popen([*nobody,'python3','-c',\"\"\"{inside}\"\"\",setup],text=True,\n\
         \x20 stdin=subprocess.PIPE,stdout=subprocess.PIPE)\n\
         \x20children.append(c)\n\
         \x20counts=c.stdout.readline().split()\n\
         \x20held+=int(counts[0]);denied+=int(counts[1])\n\
         for c in children: c.communicate()\n\
         print(held,denied)"
    );
    assert_eq!(flooding.python(&script).unwrap(), "256 144");
    assert_eq!(parts.verdicts.count(VerdictReason::Quota), 144);
    // They ended, and each count is free again, under whatever namespace it was made.
    assert_eq!(flooding.python(&script).unwrap(), "256 144");
    assert_eq!(error(&working, &options(IMDS_V4.into())), "ECONNREFUSED");
}

#[test]
fn connections_that_close_while_observed_count_no_more() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let pins = node.bpffs().join("kiam");
    let parts = attach(&node, &pins);
    accept_all(&node, parts.lease);
    let (held, counts) = Held::open(&pod, pod.cgroup(), 200);
    assert_eq!(counts, "200 0");
    let _observing = attach_as(&node, Config { mode: Mode::Observe, ..config(&node, &pins) });
    drop(held);
    let mut parts = attach(&node, &pins);
    parts.lease.renew().unwrap();
    let (_held, counts) = Held::open(&pod, pod.cgroup(), 200);
    assert_eq!(counts, "200 0");
}

#[test]
fn a_close_finds_its_entry_though_the_source_has_changed() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    parts.lease.renew().unwrap();
    pod.netns().sysctl("ipv4/ip_dynaddr", "1").unwrap();
    // Nobody answers, and at a retransmission the kernel finds the source's address gone.
    let script = "import socket,subprocess,time\n\
        def ip(*commands):\n\
        \x20for command in commands: subprocess.check_call(['ip',*command.split()])\n\
        to='route replace 10.77.0.1/32 dev lo src '\n\
        ip('link set lo up','addr add 10.9.9.1/32 dev lo','addr add 10.9.9.2/32 dev lo',to+'10.9.9.1')\n\
        s=socket.socket();s.setblocking(False)\n\
        s.connect_ex(('169.254.169.254',80))\n\
        before=s.getsockname()\n\
        ip(to+'10.9.9.2','addr del 10.9.9.1/32 dev lo')\n\
        end=time.monotonic()+10\n\
        while s.getsockname()==before and time.monotonic()<end: time.sleep(.02)\n\
        print(before[1],s.getsockname()[0])";
    let said = pod.python(script).unwrap();
    let (port, address) = said.split_once(' ').unwrap();
    assert_eq!(address, "10.9.9.2");
    let peer = SocketAddr::from(([10, 9, 9, 1], port.parse().unwrap()));
    let local = SocketAddr::from((NODE_V4, PORT));
    assert_eq!(parts.flows.take_last(peer, local).unwrap(), None);
    assert_eq!(parts.flows.take(cookie(&pod), peer, local).unwrap(), None);
}

#[test]
fn packets_that_pods_send_past_connect_are_dropped_by_the_guard_and_reach_the_imds_without_it() {
    if skip(
        "packets_that_pods_send_past_connect_are_dropped_by_the_guard_and_reach_the_imds_without_it",
    ) {
        return;
    }
    let lab = Lab::start().unwrap();
    let pod = lab.pod(PodSpec::new("default", "a")).unwrap();
    let host_pod = lab.pod(PodSpec::new("kube-system", "b").host_network()).unwrap();
    let raw = "import socket,errno\n\
        s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_UDP)\n\
        try: s.sendto(b'\\x30\\x39\\0\\x50\\0\\x08\\0\\0',('169.254.169.254',0));print('sent')\n\
        except OSError as e: print(errno.errorcode[e.errno])";
    let config = config(&lab.node, &lab.pins());
    let guard = GuardConfig { skb: true, ..GuardConfig::default() };
    let mut parts = attach_as(&lab.node, Config { guard, ..config.clone() });
    parts.lease.renew().unwrap();
    let before = lab.imds.packets();
    assert_eq!(pod.python(raw).unwrap(), "EPERM");
    assert_eq!(host_pod.python(raw).unwrap(), "EPERM");
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
    assert_eq!(pod.python(raw).unwrap(), "sent");
    assert_ne!(lab.imds.packets(), before);
    assert_eq!(parts.verdicts.count(VerdictReason::Guard), 2);
}

#[test]
fn programs_that_come_above_the_pods_cgroup_turn_the_guard_on() {
    if lab::skip!() {
        return;
    }
    let node = Node::start().unwrap();
    let pod = node.pod(PodSpec::new("default", "a").with_uid().unwrap()).unwrap();
    let mut parts = attach(&node, &node.bpffs().join("kiam"));
    assert!(!parts.guards_packets);
    assert!(!parts.programs.follow_ancestors().unwrap(), "nothing is above");
    let raw = "import socket,errno\n\
        s=socket.socket(socket.AF_INET,socket.SOCK_RAW,socket.IPPROTO_UDP)\n\
        try: s.sendto(b'\\x30\\x39\\0\\x50\\0\\x08\\0\\0',('169.254.169.254',0));print('sent')\n\
        except OSError as e: print(errno.errorcode[e.errno])";
    assert_eq!(pod.python(raw).unwrap(), "sent");
    // What a socket load balancer does: programs at a cgroup above, which run after the others.
    let above = Config::new(Some(node.root_cgroup().to_owned()), node.bpffs().join("other"));
    let above = attach_as(&node, above);
    assert!(parts.programs.follow_ancestors().unwrap());
    assert!(!parts.programs.follow_ancestors().unwrap(), "once");
    assert_eq!(pod.python(raw).unwrap(), "EPERM");
    drop(above);
    // A later start finds them by itself.
    let parts = attach(&node, &node.bpffs().join("kiam"));
    assert!(parts.guards_packets);
}

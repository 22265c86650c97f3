//! The kernel programs on the kernel: a connection speaks for a pod only from a network namespace that is known to be
//! that pod's, and one record is good for one connection.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

use std::{
    fs,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    thread,
};

use aya::maps::{HashMap, Map, MapData};

use kiam_common::{
    POD_QUOTA,
    client::{FlowKey, Opener, Sandbox},
    counters::VerdictReason,
    redirect::Target,
};
use kiam_core::{blocking::Blocking, pods::PodUid};
use kiam_kernel::{
    identity::CgroupPaths,
    intercept::{
        Config, HostNetworkPods, Interception, InterceptionParts, ListenerPath, own_namespace,
    },
    sys::cookie_of,
};
use lab::{
    IMDS_V4, LabPod, NODE_V4, Node, PodSpec, ask_by, client_binary,
    pod_client::{
        Options,
        attack::{Attack, stream::Way},
    },
    skip,
};

const PORT: u16 = 3100;

/// Connects once; what the kernel says if it denies that.
fn connect(pod: &LabPod) -> Option<String> {
    pod.ask_once(&Options::connect()).unwrap().error
}

/// The same from a network namespace that `flags` make, with `address` in it.
fn connect_from_new(pod: &LabPod, flags: &str, address: &str) -> Option<String> {
    let setup = format!(
        "ip link set lo up; ip addr add {address}/32 dev lo; ip route add default dev lo; exec \"$@\""
    );
    let mut command = pod.command("unshare").unwrap();
    command.args([flags, "sh", "-c", &setup, "sh"]).arg(client_binary().unwrap());
    ask_by(command, &Options::connect()).unwrap().error
}

/// A node with the programs of `--identity=kernel`, and a listener that accepts whatever comes.
struct Stage {
    parts: InterceptionParts,
    node: Node,
}

impl Stage {
    fn set(test: &str, host_network: HostNetworkPods) -> Option<Self> {
        if skip(test) {
            return None;
        }
        let node = Node::start().unwrap();
        let pods = Some(node.kubepods().to_owned());
        let config = Config {
            attested: true,
            host_network,
            path: ListenerPath::Auto,
            ..Config::new(pods, node.bpffs().join("kiam"))
        };
        let target = Target { v4: NODE_V4.octets(), v4_port: PORT, ..Target::default() };
        let listener = node.netns().listen(SocketAddr::from((NODE_V4, PORT))).unwrap();
        let attach = || {
            let blocking = Blocking::here().unwrap();
            Interception::load(&blocking, &config, target)?.attach(&blocking, &[listener.as_fd()])
        };
        let mut parts = node.netns().enter(attach).unwrap().unwrap();
        parts.lease.renew().unwrap();
        thread::spawn(move || listener.incoming().collect::<Vec<_>>());
        Some(Self { parts, node })
    }

    fn pod(&self, name: &str) -> LabPod {
        self.node.pod(PodSpec::new("default", name).with_uid().unwrap()).unwrap()
    }

    fn know(&self, netns: u64, pod: &LabPod) {
        let pod = fs::metadata(pod.slice().path()).unwrap().ino();
        let sandbox = Sandbox { pod, ..Sandbox::default() };
        self.parts.sandboxes.publish(netns, sandbox, &[] as &[TcpListener]).unwrap();
    }

    fn map(&self) -> HashMap<MapData, FlowKey, Opener> {
        let flows = MapData::from_pin(self.node.bpffs().join("kiam/v2/FLOWS")).unwrap();
        Map::HashMap(flows).try_into().unwrap()
    }

    /// How many entries `FLOWS` has.
    fn flows(&self) -> usize {
        self.map().keys().count()
    }
}

/// The cookie of the pod's network namespace, by a program where the kernel does not tell it.
fn cookie(stage: &Stage, pod: &LabPod) -> u64 {
    let told = || UdpSocket::bind("0.0.0.0:0").and_then(cookie_of);
    let cookie = || told().or_else(|_| own_namespace(&stage.parts.cgroup));
    pod.netns().enter(cookie).unwrap().unwrap()
}

#[test]
fn only_a_pods_own_processes_connect_from_its_namespace_and_from_no_other() {
    let name = "only_a_pods_own_processes_connect_from_its_namespace_and_from_no_other";
    if lab::no_netns_cookies() {
        return;
    }
    let Some(stage) = Stage::set(name, HostNetworkPods::Pass) else { return };
    let [pod, other] = ["a", "b"].map(|name| stage.pod(name));
    let eperm = Some("EPERM".to_owned());
    assert_eq!(connect(&pod), eperm, "nobody knows whose its namespace is");
    stage.know(cookie(&stage, &pod), &pod);
    assert_eq!(connect(&pod), None);
    assert_eq!(stage.parts.verdicts.count(VerdictReason::Namespace), 1);
    // A process of another pod in there.
    assert_eq!(other.ask_inside(pod.netns(), &Options::connect()).unwrap().error, eperm);
    // Namespaces that any user can make, with the address of the node or another pod in them.
    for address in [NODE_V4.to_string(), other.v4().to_string()] {
        assert_eq!(connect_from_new(&pod, "-Urn", &address), eperm, "{address}");
    }
    assert_eq!(stage.parts.verdicts.count(VerdictReason::Namespace), 4);
}

#[test]
fn a_pod_on_the_nodes_network_speaks_from_there_alone() {
    let name = "a_pod_on_the_nodes_network_speaks_from_there_alone";
    if lab::no_netns_cookies() {
        return;
    }
    let Some(stage) = Stage::set(name, HostNetworkPods::Intercept) else { return };
    let spec = PodSpec::new("default", "host").host_network().with_uid().unwrap();
    let pod = stage.node.pod(spec).unwrap();
    let eperm = Some("EPERM".to_owned());
    // The listener is in the node's namespace, and marked.
    assert_eq!(connect(&pod), None);
    assert_eq!(connect_from_new(&pod, "-n", "10.77.0.1"), eperm);
    // One that is bound to an interface could have the ends of another pod's connection.
    let bound = Options { interface: Some("lo".to_owned()), ..Options::connect() };
    assert_eq!(pod.ask_once(&bound).unwrap().error, eperm);
    assert_eq!(stage.parts.verdicts.count(VerdictReason::Namespace), 2);
}

#[test]
fn a_record_is_good_for_one_connection_and_the_quota_is_where_the_map_is_written() {
    let name = "a_record_is_good_for_one_connection_and_the_quota_is_where_the_map_is_written";
    let Some(stage) = Stage::set(name, HostNetworkPods::Pass) else { return };
    let pod = stage.pod("a");
    stage.know(cookie(&stage, &pod), &pod);
    // Each socket is redirected, let go, and connected by hand to the port it was redirected to: elsewhere, where
    // nobody asks, and to where it was redirected itself.
    let most = 2 * usize::try_from(POD_QUOTA).unwrap();
    let again = Attack::Reconnect {
        to: (IMDS_V4, 80).into(),
        then: vec![(NODE_V4, PORT).into(), ([10, 77, 0, 9], PORT).into()],
        count: 3 * usize::try_from(POD_QUOTA).unwrap(),
    };
    thread::scope(|scope| {
        let asking = scope.spawn(|| pod.attacker().unwrap().must(again));
        while !asking.is_finished() {
            assert!(stage.flows() <= most, "{} entries", stage.flows());
            thread::yield_now();
        }
        asking.join().unwrap().unwrap();
    });
    assert_eq!(stage.flows(), 0, "none is left");
}

#[test]
fn a_full_map_denies_at_connect_and_is_counted() {
    let name = "a_full_map_denies_at_connect_and_is_counted";
    let Some(mut stage) = Stage::set(name, HostNetworkPods::Pass) else { return };
    let pod = stage.pod("a");
    stage.know(cookie(&stage, &pod), &pod);
    let mut map = stage.map();
    let eperm = Some("EPERM".to_owned());
    // Of namespaces that there are none of: what pods may hold has room.
    let junk = |number: u64| FlowKey {
        netns: u64::MAX - number,
        source: [0; 16],
        destination: [0; 16],
        source_port_be: 0,
        destination_port_be: 0,
        pad: 0,
    };
    let mut filled = 0;
    while map.insert(junk(filled), Opener::default(), 0).is_ok() {
        filled += 1;
    }
    stage.parts.lease.renew().unwrap();
    assert_eq!(connect(&pod), eperm);
    assert_eq!(stage.parts.verdicts.count(VerdictReason::Full), 1);
    // Room for one entry of the two.
    map.remove(&junk(0)).unwrap();
    stage.parts.lease.renew().unwrap();
    assert_eq!(connect(&pod), eperm);
    assert_eq!(stage.parts.verdicts.count(VerdictReason::Full), 2);
    assert_eq!(u64::try_from(stage.flows()).unwrap(), filled - 1);
    map.remove(&junk(1)).unwrap();
    stage.parts.lease.renew().unwrap();
    assert_eq!(connect(&pod), None);
}

#[test]
fn what_is_taken_for_a_connection_is_its_own_pods() {
    let name = "what_is_taken_for_a_connection_is_its_own_pods";
    let Some(stage) = Stage::set(name, HostNetworkPods::Pass) else { return };
    let pod = stage.pod("a");
    stage.know(cookie(&stage, &pod), &pod);
    let mut asking = pod.attacker().unwrap();
    asking.must(Attack::Keep { way: Way::Connect, to: (IMDS_V4, 80).into() }).unwrap();
    let ends = asking.attempt(Attack::Ends, 1000).unwrap().body;
    let peer: SocketAddr = ends.split_once(' ').unwrap().0.parse().unwrap();
    let local = SocketAddr::from((NODE_V4, PORT));
    let entry = stage.parts.flows.take(cookie(&stage, &pod), peer, local).unwrap().unwrap();
    assert_eq!((entry.netns, entry.on_host), (cookie(&stage, &pod), false));
    let paths = CgroupPaths::new(stage.parts.cgroup.clone());
    assert_eq!(paths.pod(entry.cgroup), Ok(PodUid::new(pod.uid())));
}

//! The guard on the kernel, with the whole agent: nothing that slips past the hooks at connect gets to the metadata
//! service, and the node's own traffic is left alone.

#![expect(clippy::unwrap_used, reason = "clippy knows no test helpers outside #[test] functions")]

mod boot;
mod services;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lab::{
    Attacker, Cgroup, IMDS_V4, IMDS_V6, Lab, LabPod, NODE_V4, Neighbour, Netns, PodSpec,
    client_binary, eventually,
    pod_client::{
        Options,
        attack::{Attack, frame, raw, stream::Way},
        hostile::{Program, Report},
    },
};

const AGENT: &str = env!("CARGO_BIN_EXE_kiam-agent");
/// Ways by which the pod's own processes send.
const INSIDE: [&str; 7] = [
    "tcp from a raw socket",
    "icmp",
    "icmpv6",
    "ipv4 packet",
    "ipv4 frame",
    "ipv6 packet",
    "ipv6 frame",
];
/// The same for a process in the pod's network namespace but outside the pods' cgroup, for which no hook runs.
const OUTSIDE: &str = "connect";

/// Sends by `way`; what the sending socket said.
fn send(pod: &LabPod, way: &str) -> String {
    send_from(pod, way, pod.ips(), "eth0")
}

/// Sends by `way` with `sources` as its own addresses, by `interface` where the way has one.
fn send_from(pod: &LabPod, way: &str, sources: [IpAddr; 2], interface: &str) -> String {
    let mut attacker = match way {
        OUTSIDE => Attacker::start_by(pod.netns().command(client_binary().unwrap())),
        _ => pod.attacker(),
    }
    .unwrap();
    let attempt = attacker.attempt(attack(way, sources, interface), 5000).unwrap();
    // Refused by the node, and behind the packet on the same link: when this is answered, that was dealt with.
    attacker.attempt(connect((NODE_V4, 80).into()), 5000).unwrap();
    attempt.error.unwrap_or_else(|| "sent".to_owned())
}

fn attack(way: &str, [v4, v6]: [IpAddr; 2], interface: &str) -> Attack {
    let (from, to) =
        if way.contains("v6") { (v6, IMDS_V6.into()) } else { (v4, IpAddr::from(IMDS_V4)) };
    let frame = |way| Attack::Frame { way, from, to, interface: Some(interface.to_owned()) };
    match way.split_once(' ').map_or(way, |(_, sort)| sort) {
        "from a raw socket" => Attack::Raw { way: raw::Way::SynHeader, from, to },
        "icmp" | "icmpv6" => Attack::Raw { way: raw::Way::Echo, from, to },
        "packet" => frame(frame::Way::Dgram),
        "frame" => frame(frame::Way::Raw),
        "tagged frame" => frame(frame::Way::Tagged),
        OUTSIDE => connect((to, 80).into()),
        other => unreachable!("{other} is no way to send"),
    }
}

fn connect(to: SocketAddr) -> Attack {
    Attack::Keep { way: Way::Connect, to }
}

fn packets(lab: &Lab, pod: &LabPod) -> u64 {
    packets_from(lab, pod.ips())
}

fn packets_from(lab: &Lab, sources: [IpAddr; 2]) -> u64 {
    let all = lab.imds.packets();
    sources.iter().filter_map(|address| all.get(address)).sum()
}

/// Sends in every way and asserts that nothing arrives.
fn assert_shut(lab: &Lab, pod: &LabPod, when: &str) {
    for way in INSIDE.iter().chain([&OUTSIDE]) {
        let said = send(pod, way);
        assert_eq!(packets(lab, pod), 0, "{when}: {way} got to IMDS ({said})");
    }
}

/// The rules to the metadata service, of both families, as `ip` shows them.
fn rules(netns: &Netns) -> Vec<String> {
    let of = |family: &str| {
        let output = netns.command("ip").args([family, "rule"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    // Where `ip` has no names for protocols, it shows their numbers.
    let all = (of("-4") + &of("-6")).replace("ipproto-6", "tcp").replace("ipproto-17", "udp");
    let ours = all.lines().filter(|line| line.contains("169.254.169.254") || line.contains("ec2"));
    ours.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// What [`rules`] are with a guard of this preference.
fn expected_rules(preference: u32) -> Vec<String> {
    let rule = |further: u32, to: &str, what: &str| {
        let (source, what) = what.strip_prefix("from ").map_or(("all", what), |from| {
            from.split_once(' ').expect("a source and what follows it")
        });
        let what = what.replace("pass", &format!("goto {}", preference + 4));
        format!("{}: from {source} to {to} {what} proto 107", preference + further)
    };
    let of = |to: &str, middle: &[(u32, &str)]| {
        let first = ["iif lo ipproto tcp pass", "iif lo ipproto udp pass"].map(|what| (0, what));
        let last = [(3, "prohibit"), (4, "nop")];
        let all = first.iter().chain(middle).chain(&last);
        all.map(|(further, what)| rule(*further, to, what)).collect::<Vec<_>>()
    };
    let v4 = [(1, "from 0.0.0.0 iif lo prohibit"), (2, "iif lo pass")];
    let v6 = [(2, "from ::/1 iif lo pass"), (2, "from 8000::/1 iif lo pass")];
    [of("169.254.169.254", &v4), of("fd00:ec2::254", &v6)].concat()
}

fn ip(netns: &Netns, arguments: &str) {
    let output = netns.command("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

fn host_gets_the_instance_id(lab: &Lab) {
    for address in [IpAddr::from(IMDS_V4), IMDS_V6.into()] {
        let options =
            Options { to: Some(address), ..Options::get("/latest/meta-data/instance-id") };
        let attempt = lab.node.ask_once(&options).unwrap();
        assert_eq!(attempt.status, Some(200), "{address}: {attempt:?}");
    }
}

/// A process with a connection to the metadata service.
struct Held(Attacker);

impl Held {
    fn connect(mut attacker: Attacker, to: &str) -> Self {
        attacker.must(connect((to.parse::<IpAddr>().unwrap(), 80).into())).unwrap();
        Self(attacker)
    }

    fn of_host(lab: &Lab, to: &str) -> Self {
        Self::connect(lab.node.attacker().unwrap(), to)
    }

    fn of_pod(pod: &LabPod, to: &str) -> Self {
        Self::connect(pod.attacker().unwrap(), to)
    }

    /// What comes of asking for something.
    fn send(&mut self) -> String {
        let text = "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: imds\r\n\r\n".to_owned();
        let mut last = None;
        for attack in [Attack::Write { text }, Attack::Read] {
            let attempt = self.0.attempt(attack, 5000).unwrap();
            if let Some(error) = attempt.error {
                return error;
            }
            last = Some(attempt.body);
        }
        let alive = last.is_some_and(|answer| answer.starts_with("HTTP/1.1 200"));
        if alive { "alive" } else { "closed" }.to_owned()
    }
}

#[test]
fn nothing_sent_past_the_hooks_arrives_while_the_agent_runs_and_after_it_died() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&[]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    assert_shut(&lab, &pod, "with the agent");
    host_gets_the_instance_id(&lab);
    agent.kill().unwrap();
    assert_shut(&lab, &pod, "after kill -9");
    host_gets_the_instance_id(&lab);

    let said = lab.uninstall().unwrap();
    assert_eq!(said.matches("removed routing rule").count(), 12, "{said}");
    assert_eq!(rules(lab.node.netns()), Vec::<String>::new());
    // The same packets do arrive now: they were stopped by what is gone, and not by a mistake in them.
    for way in INSIDE.iter().chain([&OUTSIDE]) {
        let before = packets(&lab, &pod);
        let said = send(&pod, way);
        eventually(&format!("{way} ({said}) does not get to IMDS"), || {
            packets(&lab, &pod) > before
        });
    }
    assert!(lab.uninstall().unwrap().contains("nothing"), "idempotent");
}

/// Preferences at which a rule is removed, so that each sort of rule is once.
const REMOVED: [(&str, u32); 8] = [
    ("-4", 40),
    ("-4", 41),
    ("-4", 42),
    ("-4", 43),
    ("-4", 44),
    ("-6", 43),
    ("-6", 42),
    ("-6", 40),
];

#[test]
fn rules_that_somebody_removes_are_put_back_at_once() {
    let Some(lab) = lab::node_test!() else { return };
    let agent = lab.agent(&["--guard-preference=40"]);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let netns = lab.node.netns();
    let whole = rules(netns);
    assert_eq!(whole, expected_rules(40));
    let mut sorted = whole;
    sorted.sort();
    for (family, preference) in REMOVED {
        ip(netns, &format!("{family} rule del pref {preference}"));
        eventually("a rule stays away", || {
            // Of two rules with one preference, that which was removed comes last.
            let mut now = rules(netns);
            now.sort();
            now == sorted
        });
    }
    assert_shut(&lab, &pod, "after the rules were removed");
    host_gets_the_instance_id(&lab);
    let metrics = agent.metrics();
    assert!(metrics.contains("kiam_guard_restored_total 8\n"), "{metrics}");
    assert!(agent.log().contains("Restored routing rules of the guard"), "{}", agent.log());
}

/// A process of the pod that sends packets to the metadata service without end.
fn flood(pod: &LabPod) -> Neighbour {
    pod.hostile(&Program::Ping).unwrap()
}

/// Ends the flood, which has gone on until now.
fn end(mut flood: Neighbour) {
    assert!(flood.is_running(), "the flood ended early");
    let Report(counts) = flood.finish().unwrap();
    assert!(counts.values().sum::<u64>() > 0, "{counts:?}");
}

#[test]
fn another_preference_moves_the_rules_without_a_gap() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    let mut agent = lab.agent(&[]);
    let flood = flood(&pod);
    // Up over the old ones, and down over them again.
    for preference in ["7", "5"] {
        agent.kill().unwrap();
        agent = lab.agent(&["--guard-preference", preference]);
        host_gets_the_instance_id(&lab);
        let now = rules(lab.node.netns());
        assert!(now.len() == 12 && now[0].starts_with(&format!("{preference}:")), "{now:?}");
    }
    end(flood);
    assert_eq!(packets(&lab, &pod), 0);
}

#[test]
fn a_nodes_own_route_to_imds_counts_in_whatever_table_it_is() {
    let Some(lab) = lab::node_test!() else { return };
    let netns = lab.node.netns();
    for (family, to, source) in
        [("-4", "169.254.169.254", "10.77.0.1"), ("-6", "fd00:ec2::254", "fd77::1")]
    {
        ip(netns, &format!("{family} route add {to} dev eth0 src {source} table 77"));
        ip(netns, &format!("{family} rule add pref 300 table 77"));
        ip(netns, &format!("{family} route del {to} dev eth0 table main"));
        // A look-up of the main table alone would end here.
        ip(netns, &format!("{family} route add blackhole {to}"));
    }
    host_gets_the_instance_id(&lab);
    let _agent = lab.agent(&[]);
    host_gets_the_instance_id(&lab);
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    assert_shut(&lab, &pod, "with the route in another table");
}

/// A connection from a cgroup that the pod made and removed again.
fn of_a_removed_cgroup(pod: &LabPod) -> Held {
    let cgroup = Cgroup::create(pod.cgroup().path().join("made")).unwrap();
    let held = Held::connect(pod.attacker_in(&cgroup).unwrap(), "169.254.169.254");
    std::fs::write(pod.cgroup().path().join("cgroup.procs"), held.0.pid().to_string()).unwrap();
    std::fs::remove_dir(cgroup.path()).unwrap();
    held
}

#[test]
fn connections_of_pods_that_are_older_than_the_agent_end_and_the_hosts_go_on() {
    if lab::skip!() {
        return;
    }
    let ended = "ECONNABORTED";
    for (host_network, guard, expected) in [
        ("pass", "--guard=route", "alive"),
        // Nothing notes that the packets of a connection so old may pass.
        ("pass", "--guard=skb", ended),
        ("pass", "--guard=uplink", ended),
        // No routing rules: what ends the connections is that they are ended.
        ("intercept", "--guard=skb", ended),
    ] {
        let lab = Lab::start().unwrap();
        let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
        let on_host = lab.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
        let mut of_pod = ["169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254"]
            .map(|to| Held::of_pod(&pod, to));
        let mut of_host_pod = Held::of_pod(&on_host, "169.254.169.254");
        let mut of_removed = of_a_removed_cgroup(&on_host);
        let mut of_host = Held::of_host(&lab, "169.254.169.254");
        // In the pod's network, outside its cgroup.
        let beside = pod.netns().command(client_binary().unwrap());
        let beside = Attacker::start_by(beside).unwrap();
        let mut beside = Held::connect(beside, "169.254.169.254");
        let all = [&mut beside, &mut of_host_pod, &mut of_removed, &mut of_host];
        for held in of_pod.iter_mut().chain(all) {
            assert_eq!(held.send(), "alive", "before the agent");
        }
        let flags = [guard, "--host-network-pods", host_network];
        let mut agent = lab.agent(&flags);
        let before = packets(&lab, &pod);
        for held in of_pod.iter_mut().chain([&mut beside]) {
            assert_eq!(held.send(), ended, "{flags:?}");
        }
        assert_eq!(packets(&lab, &pod), before, "{flags:?}");
        assert_eq!(of_host_pod.send(), expected, "{flags:?}");
        assert_eq!(of_removed.send(), expected, "{flags:?}");
        assert_eq!(of_host.send(), "alive", "{flags:?}");
        let count = if expected == ended { 6 } else { 4 };
        let metrics = agent.metrics();
        let line = format!("kiam_guard_sockets_destroyed_total {count}\n");
        assert!(metrics.contains(&line), "{line} is not in {metrics}");
        if host_network == "pass" {
            // What an earlier agent let through goes on.
            let mut let_through = Held::of_pod(&on_host, "169.254.169.254");
            agent.kill().unwrap();
            let _agent = lab.agent(&flags);
            assert_eq!(let_through.send(), "alive", "{flags:?}");
        }
    }
}

#[test]
fn a_node_whose_pods_bypass_its_routing_is_found_out() {
    if lab::skip!() {
        return;
    }
    for bypass in [false, true] {
        let lab = Lab::start().unwrap();
        let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
        if bypass {
            // Another way out than the node's stack, as with an interface of its own (SR-IOV, ipvlan).
            let imds = lab.node.imds_netns();
            pod.netns()
                .ip(&format!("link add way type veth peer name way netns {}", imds.path()))
                .unwrap();
            pod.netns().ip("link set way up\nroute add 169.254.169.254 dev way").unwrap();
            imds.ip(&format!("link set way up\nroute add {} dev way", pod.v4())).unwrap();
        }
        let mut sleeper = pod.command("sleep").unwrap().arg("60").spawn().unwrap();
        let agent = lab.agent(&[]);
        let (state, other) = if bypass { ("open", "holds") } else { ("holds", "open") };
        let ready = || agent.admin("/ready").unwrap().body;
        eventually("/ready says nothing of it", || {
            ready().contains(&format!("guard route: {state}"))
        });
        assert!(ready().starts_with("ready\n"), "{}", ready());
        let metrics = agent.metrics();
        for line in [format!("{state}\"}} 1"), format!("{other}\"}} 0")] {
            assert!(
                metrics.contains(&format!("kiam_guard_route{{state=\"{line}\n")),
                "{line}: {metrics}"
            );
        }
        assert_eq!(
            agent.log().contains("The route guard does not hold"),
            bypass,
            "{}",
            agent.log()
        );
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
    }
}

/// Ways with a source address that the sender chooses.
const FORGED: [&str; 7] = [
    "tcp from a raw socket",
    "ipv4 packet",
    "ipv4 frame",
    "ipv4 tagged frame",
    "ipv6 packet",
    "ipv6 frame",
    "ipv6 tagged frame",
];
/// No addresses of the node: what its own stack sends or answers must not count.
const FORGED_SOURCES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 9, 9)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 9, 0, 0, 0, 0, 0, 9)),
];

/// Removes all pins, which are gone at once for whoever looks.
fn take_pins_away(lab: &Lab) {
    let gone = lab.pins().with_file_name("gone");
    std::fs::rename(lab.pins(), &gone).unwrap();
    std::fs::remove_dir_all(gone).unwrap();
}

/// What guards the uplinks: the names of the pinned links; on a kernel without them the interfaces that have the filter.
fn uplink_guards(lab: &Lab) -> Vec<String> {
    if lab::has_tcx() {
        let entries = std::fs::read_dir(lab.pins().join("v2")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        return names.filter(|name| name.starts_with("link_uplink_")).collect();
    }
    let filters = |interface: &&str| {
        let mut tc = lab.node.command("tc").unwrap();
        let shown = tc.args(["filter", "show", "dev", *interface, "egress"]).output().unwrap();
        String::from_utf8_lossy(&shown.stdout).contains("kiam_uplink")
    };
    ["eth0", "eth1"].into_iter().filter(filters).map(str::to_owned).collect()
}

/// No way to forge a packet gets one of `pod` to IMDS by `interface`.
fn assert_forged_nothing(lab: &Lab, pod: &LabPod, interface: &str, when: &str) {
    for way in FORGED {
        let said = send_from(pod, way, FORGED_SOURCES, interface);
        let count = packets_from(lab, FORGED_SOURCES);
        assert_eq!(count, 0, "{when}: {way} got to IMDS by {interface} ({said})");
    }
}

/// An interface that comes later, with a route in a table of its own, as a second ENI's.
fn add_eth1(lab: &Lab) {
    let (netns, imds) = (lab.node.netns(), lab.node.imds_netns());
    netns.ip(&format!("link add eth1 type veth peer name eth1 netns {}", imds.path())).unwrap();
    imds.ip("link set eth1 up").unwrap();
    netns.ip("link set eth1 up\nroute add default dev eth1 table 2").unwrap();
}

#[test]
fn packet_sockets_of_host_network_pods_end_at_the_uplinks() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&["--host-network-pods=intercept"]);
    let spec = PodSpec::new("kube-system", "proxy").host_network();
    let pod = lab.pod(spec).unwrap();
    let assert_shut =
        |interface: &str, when: &str| assert_forged_nothing(&lab, &pod, interface, when);
    assert_shut("eth0", "with the agent");
    host_gets_the_instance_id(&lab);
    let first = uplink_guards(&lab);
    assert_eq!(first.len(), 1);

    add_eth1(&lab);
    let metrics = || agent.metrics();
    eventually("the new uplink is not guarded", || metrics().contains("kiam_guard_uplinks 2\n"));
    assert_shut("eth1", "with a new uplink");

    agent.kill().unwrap();
    assert_shut("eth0", "after kill -9");
    assert_shut("eth1", "after kill -9");
    let both = uplink_guards(&lab);
    let agent = lab.agent(&["--host-network-pods=intercept"]);
    assert_shut("eth0", "after a restart");
    assert_eq!(uplink_guards(&lab).len(), both.len(), "replaced, not added");
    lab.node.netns().ip("link del eth1").unwrap();
    eventually("the guard of an interface that is gone stays", || uplink_guards(&lab) == first);
    eventually("it is counted", || agent.metrics().contains("kiam_guard_uplinks 1\n"));

    drop(agent);
    let said = lab.uninstall().unwrap();
    assert!(
        said.contains(if lab::has_tcx() { "link_uplink_" } else { "the egress of eth0" }),
        "{said}"
    );
    for way in FORGED {
        let before = packets_from(&lab, FORGED_SOURCES);
        let said = send_from(&pod, way, FORGED_SOURCES, "eth0");
        let arrived = || packets_from(&lab, FORGED_SOURCES) > before;
        eventually(&format!("{way} ({said}) does not get to IMDS"), arrived);
    }
}

#[test]
fn links_at_the_uplinks_that_somebody_takes_away_come_back() {
    let Some(lab) = lab::node_test!() else { return };
    if lab::no_tcx() {
        return;
    }
    let agent = lab.agent(&["--host-network-pods=intercept"]);
    let pod = lab.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
    add_eth1(&lab);
    let metrics = || agent.metrics();
    eventually("the new uplink is not guarded", || metrics().contains("kiam_guard_uplinks 2\n"));
    let assert_shut = |when: &str| {
        assert_forged_nothing(&lab, &pod, "eth0", when);
        assert_forged_nothing(&lab, &pod, "eth1", when);
    };
    // Without pins nothing changes; what they stood for is detached then.
    let both = uplink_guards(&lab);
    take_pins_away(&lab);
    assert_shut("without pins");
    eventually("the pins are not back", || {
        lab.pins().join("v2").exists() && uplink_guards(&lab) == both
    });
    for pin in &both {
        lab.node.detach_link(&lab.pins().join("v2").join(pin)).unwrap();
    }
    eventually("it is not at the uplinks again", || {
        metrics().contains("kiam_guard_restored_total 4\n")
    });
    assert_shut("after it was detached");
}

#[test]
fn what_pods_send_past_the_routing_rules_ends_at_the_uplinks() {
    let Some(lab) = lab::node_test!() else { return };
    let mut agent = lab.agent(&["--guard=uplink"]);
    assert_eq!(rules(lab.node.netns()), Vec::<String>::new());
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    assert_shut(&lab, &pod, "with the agent");
    host_gets_the_instance_id(&lab);
    agent.kill().unwrap();
    assert_shut(&lab, &pod, "after kill -9");
    host_gets_the_instance_id(&lab);
}

#[test]
fn an_agent_without_the_guard_takes_an_earlier_ones_away() {
    let Some(lab) = lab::node_test!() else { return };
    for further in ["--guard=none", "--mode=observe"] {
        let mut agent = lab.agent(&["--guard=route,uplink"]);
        assert_eq!(rules(lab.node.netns()).len(), 12);
        assert_eq!(uplink_guards(&lab).len(), 1);
        agent.kill().unwrap();
        let _agent = lab.agent(&[further]);
        assert_eq!(rules(lab.node.netns()), Vec::<String>::new(), "{further}");
        assert_eq!(uplink_guards(&lab), Vec::<String>::new(), "{further}");
    }
}

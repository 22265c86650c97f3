//! What the node's network lacks, or has too much of.

use std::{
    any::Any,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread,
};

use kiam_core::preflight::{
    Topic::{EphemeralPorts, KubeProxy, Ports, Redirects, RouteGuard, RoutingRules, Uplink},
    Verdict::{Fail, Ok as Good, Unknown, Warn},
};
use lab::{AGENT_PORT, Lab, LabPod, NODE_V4, PodSpec};

use super::{Row, row, run::Setting};

/// As kiam's agent and kube2iam make it.
const REDIRECT: &str = "-t nat -A PREROUTING -d 169.254.169.254/32 -i eni+ -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.77.0.1:8181";

/// Runs a command in the node's network namespace.
fn run(lab: &Lab, command: &str) {
    let mut words = command.split(' ');
    let mut run = lab.node.netns().command(words.next().unwrap());
    let output = run.args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// After this command in the node's network namespace.
fn after(lab: &Lab, command: &str) -> Setting {
    run(lab, command);
    Setting::default()
}

/// After these commands of `ip` there.
fn after_ip(lab: &Lab, commands: &str) -> Setting {
    lab.node.netns().ip(commands).unwrap();
    Setting::default()
}

fn pod(lab: &Lab) -> LabPod {
    lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap()
}

/// A pod with another way out than the node's routing, as with an interface of its own (SR-IOV, ipvlan).
fn bypassing(lab: &Lab) -> impl Any {
    let (pod, imds) = (pod(lab), lab.node.imds_netns());
    let own = format!("link add way type veth peer name way netns {}", imds.path());
    pod.netns().ip(&own).unwrap();
    pod.netns().ip("link set way up\nroute add 169.254.169.254 dev way").unwrap();
    imds.ip(&format!("link set way up\nroute add {} dev way", pod.v4())).unwrap();
    pod
}

/// A pod whose packets nobody answers.
fn unanswered(lab: &Lab) -> impl Any {
    let pod = pod(lab);
    run(lab, "iptables -t raw -A PREROUTING -d 169.254.169.254 -j DROP");
    pod
}

/// kube-proxy's answer to which mode it is in.
fn kube_proxy(lab: &Lab, mode: &'static str) -> Setting {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 10249));
    let listener: TcpListener = lab.node.netns().listen(address).unwrap();
    thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let _ = stream.read(&mut [0; 1024]);
        let length = mode.len();
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n{mode}");
        let _ = stream.write_all(head.as_bytes());
    });
    Setting::default()
}

pub(super) const ROWS: &[Row] = &[
    row("a taken port", Ports, Fail, &["--host 10.77.0.1:3100", "in use", "--port"], |lab| {
        let listener = lab.node.netns().listen((NODE_V4, AGENT_PORT).into()).unwrap();
        Setting::default().holding(listener)
    }),
    row(
        "a taken admin port",
        Ports,
        Fail,
        &["--admin 127.0.0.1:3101", "another with --admin"],
        |lab| {
            let listener = lab.node.netns().listen((Ipv4Addr::LOCALHOST, 3101).into()).unwrap();
            Setting::default().holding(listener)
        },
    ),
    row("another node's address", Ports, Fail, &["10.99.0.1:3100", "hostNetwork: true"], |_| {
        Setting::flags(&["--host=10.99.0.1"])
    }),
    row("ephemeral ports", EphemeralPorts, Warn, &["3100 (--port)", "1024 to 65000"], |lab| {
        lab.node.netns().sysctl("ipv4/ip_local_port_range", "1024 65000").unwrap();
        Setting::default()
    }),
    row("reserved ports", EphemeralPorts, Good, &["1024 to 65000"], |lab| {
        lab.node.netns().sysctl("ipv4/ip_local_port_range", "1024 65000").unwrap();
        lab.node.netns().sysctl("ipv4/ip_local_reserved_ports", "3000-3101").unwrap();
        Setting::default()
    }),
    row(
        "a rule before the guard's",
        RoutingRules,
        Warn,
        &["3: from 10.0.0.0/8 lookup 77", "--guard-preference"],
        |lab| after_ip(lab, "rule add pref 3 from 10.0.0.0/8 table 77"),
    ),
    row("a rule after the guard's", RoutingRules, Good, &["5 to 9"], |lab| {
        after_ip(lab, "rule add pref 512 from all table 77")
    }),
    row("rules that can't be read", RoutingRules, Unknown, &["capabilities"], |_| {
        // NETLINK_ROUTE.
        Setting::forbidding((libc::SYS_socket, Some((2, 0)), libc::EACCES))
            .and_flags(&["--guard=route"])
    }),
    row("no pod", RouteGuard, Unknown, &["no pod with a network of its own"], |_| {
        Setting::default()
    }),
    row("a pod", RouteGuard, Good, &["pass the node's routing"], |lab| {
        Setting::default().holding(pod(lab))
    }),
    row(
        "a pod that bypasses the node",
        RouteGuard,
        Warn,
        &["bypass", "--guard=route,uplink"],
        |lab| Setting::default().holding(bypassing(lab)),
    ),
    row(
        "a pod that bypasses the node, uplinks guarded",
        RouteGuard,
        Warn,
        &["uplink alone"],
        |lab| Setting::flags(&["--guard=route,uplink"]).holding(bypassing(lab)),
    ),
    row(
        "a pod whose packets nobody answers",
        RouteGuard,
        Unknown,
        &["no router answered"],
        |lab| Setting::default().holding(unanswered(lab)),
    ),
    row("no guard", RouteGuard, Warn, &["--guard=none"], |_| Setting::flags(&["--guard=none"])),
    row("another guard", RouteGuard, Good, &["other parts"], |_| Setting::flags(&["--guard=skb"])),
    row("uplinks", Uplink, Good, &["eth0"], |_| Setting::flags(&["--guard=uplink"])),
    row("no uplink", Uplink, Warn, &["no route to the metadata service"], |lab| {
        after_ip(lab, "link set eth0 down").and_flags(&["--guard=uplink"])
    }),
    row("no tcx", Uplink, Unknown, &["clsact", "cls_bpf"], |_| {
        Setting::forbidding((libc::SYS_bpf, Some((0, 28)), libc::EINVAL))
            .and_flags(&["--guard=uplink"])
    }),
    row("links forbidden", Uplink, Fail, &["no program can be attached", "--guard=route"], |_| {
        Setting::forbidding((libc::SYS_bpf, Some((0, 28)), libc::EPERM))
            .and_flags(&["--guard=uplink"])
    }),
    row(
        "kiam's rule, by nftables",
        Redirects,
        Warn,
        &["to 10.77.0.1:8181 (nftables, ip nat PREROUTING)", "docs/migrating.md"],
        |lab| after(lab, &format!("iptables-nft {REDIRECT}")),
    ),
    row(
        "kiam's rule, by the older interface",
        Redirects,
        Warn,
        &["to 10.77.0.1:8181 (iptables-legacy, table nat)"],
        |lab| after(lab, &format!("iptables-legacy {REDIRECT}")),
    ),
    row("a rule of nftables", Redirects, Warn, &["nftables, ip own pre"], |lab| {
        run(lab, "nft add table ip own");
        run(lab, "nft add chain ip own pre { type nat hook prerouting priority -100 ; }");
        after(
            lab,
            "nft add rule ip own pre ip daddr 169.254.169.254 tcp dport 80 redirect to :8181",
        )
    }),
    row("a rule for IPv6", Redirects, Warn, &["nftables, ip6 nat PREROUTING"], |lab| {
        after(
            lab,
            "ip6tables-nft -t nat -A PREROUTING -d fd00:ec2::254 -p tcp --dport 80 -j REDIRECT --to-ports 8181",
        )
    }),
    row("kiam's rule, observing", Redirects, Good, &["leaves alone"], |lab| {
        run(lab, &format!("iptables-nft {REDIRECT}"));
        Setting::flags(&["--mode=observe"])
    }),
    row("rules of others", Redirects, Good, &["no rule redirects"], |lab| {
        run(
            lab,
            "iptables-nft -t nat -A PREROUTING -d 10.96.0.1/32 -p tcp --dport 443 -j DNAT --to-destination 10.77.0.1:6443",
        );
        after(
            lab,
            "iptables-legacy -t nat -A PREROUTING -p tcp --dport 8080 -j DNAT --to-destination 10.77.0.1:80",
        )
    }),
    row("no kube-proxy", KubeProxy, Unknown, &["neither kube-proxy nor", "docs/guard.md"], |_| {
        Setting::default()
    }),
    row("IPVS", KubeProxy, Good, &["mode ipvs"], |lab| kube_proxy(lab, "ipvs")),
    row("IPVS without the route guard", KubeProxy, Warn, &["mode ipvs", "add route"], |lab| {
        kube_proxy(lab, "ipvs").and_flags(&["--guard=skb"])
    }),
    row("kube-proxy's answer", KubeProxy, Good, &["mode nftables"], |lab| {
        kube_proxy(lab, "nftables")
    }),
    row("the interface of IPVS", KubeProxy, Good, &["mode ipvs"], |lab| {
        after_ip(lab, "link add kube-ipvs0 type veth peer name other")
    }),
    row("the table of nftables", KubeProxy, Good, &["mode nftables"], |lab| {
        after(lab, "nft add table ip kube-proxy")
    }),
    row("the chain of iptables", KubeProxy, Good, &["mode iptables"], |lab| {
        after(lab, "iptables-nft -t nat -N KUBE-SERVICES")
    }),
    row("the chain of older iptables", KubeProxy, Good, &["mode iptables"], |lab| {
        after(lab, "iptables-legacy -t nat -N KUBE-SERVICES")
    }),
];

//! What a Service forwards to the metadata service, by kube-proxy's means, and what else of the node's looks its address
//! up: a tenant may write EndpointSlices that name `fd00:ec2::254`.

use std::{net::IpAddr, process::Command, time::Duration};

use lab::{
    Agent, IMDS_V4, IMDS_V6, Lab, LabPod, PodSpec,
    pod_client::{Attempt, Options},
};

use super::{Held, host_gets_the_instance_id, ip, packets, rules};

/// An emulated machine, on which IPVS may be tried, takes minutes to start an agent.
const EMULATED: Duration = Duration::from_secs(400);
/// The Service's addresses, on the node's loopback as kube-proxy has them on `kube-ipvs0`.
const SERVICE: [&str; 2] = ["10.96.0.1", "fd77:96::1"];

/// Prints why, and says so, if `program` with `arguments` does not run on the node. Nobody is to be refused a run of the
/// tests for want of it: few kernels have IPVS, and none that is built without modules gets it by an installation.
fn lacks(lab: &Lab, program: &str, arguments: &[&str]) -> bool {
    let problem = match lab.node.command(program).unwrap().args(arguments).output() {
        Ok(output) if output.status.success() => return false,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    // Named after its test.
    let thread = std::thread::current();
    eprintln!("skipped: {}: {program}: {problem}", thread.name().unwrap_or_default());
    true
}

fn run(mut command: Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn nft(lab: &Lab, ruleset: &str) {
    let mut command = lab.node.command("nft").unwrap();
    command.arg(ruleset);
    run(command);
}

/// The rules of an agent before this one, and of one that runs beside it: `iif lo` alone passed.
fn add_earlier_rules(lab: &Lab) {
    for (family, to) in [("-4", "169.254.169.254"), ("-6", "fd00:ec2::254")] {
        for rule in ["pref 7 nop", "pref 5 iif lo goto 7", "pref 6 prohibit"] {
            ip(lab.node.netns(), &format!("{family} rule add to {to} {rule} protocol 107"));
        }
    }
}

/// The instance's id by a Service's address.
fn by_service(address: &str) -> Options {
    let to = Some(address.parse::<IpAddr>().unwrap());
    Options { to, timeout_ms: 2000, ..Options::get("/latest/meta-data/instance-id") }
}

/// What the pod gets by each address of the Service, and how many of its packets have come to IMDS until then.
fn ask_by_service(lab: &Lab, pod: &LabPod, when: &str) -> ([Attempt; 2], u64) {
    let attempts = SERVICE.map(|address| pod.ask_once(&by_service(address)).unwrap());
    let count = packets(lab, pod);
    eprintln!(
        "{when}: statuses {:?}, errors {:?}, {count} packets of the pod at IMDS until now",
        attempts.each_ref().map(|attempt| attempt.status),
        attempts.each_ref().map(|attempt| attempt.error.clone())
    );
    (attempts, count)
}

/// The pod gets at IMDS by both addresses: what shuts them later is not a mistake of the lab's. The packets until then.
fn assert_open(lab: &Lab, pod: &LabPod, when: &str) -> u64 {
    let (attempts, count) = ask_by_service(lab, pod, when);
    for attempt in attempts {
        assert_eq!(attempt.status, Some(200), "{when}: {attempt:?}");
    }
    assert!(count > 0, "{when}");
    count
}

/// Nothing more than `before` arrives of what the pod sends to the Service.
fn assert_service_is_shut(lab: &Lab, pod: &LabPod, before: u64, when: &str) {
    let (attempts, count) = ask_by_service(lab, pod, when);
    for attempt in attempts {
        assert_eq!(attempt.status, None, "{when}: {attempt:?}");
    }
    assert_eq!(count, before, "{when}");
}

/// A lab with a Service whose only endpoint is IMDS, by IPVS; none where the kernel or ipvsadm is not there.
fn lab_with_ipvs(test: &str) -> Option<(Lab, LabPod)> {
    if lab::skip(test) {
        return None;
    }
    let lab = Lab::start().unwrap();
    if lacks(&lab, "ipvsadm", &["-L", "-n"]) {
        return None;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    eprintln!("{test}: kernel {}", release.trim());
    let netns = lab.node.netns();
    // As kube-proxy sets it.
    netns.sysctl("ipv4/vs/conntrack", "1").unwrap();
    for (service, endpoint, prefix) in [
        (SERVICE[0].to_owned(), IMDS_V4.to_string(), 32),
        (format!("[{}]", SERVICE[1]), format!("[{IMDS_V6}]"), 128),
    ] {
        let address = service.trim_matches(['[', ']']);
        ip(netns, &format!("address add {address}/{prefix} dev lo"));
        let service = format!("{service}:80");
        for arguments in
            [format!("-A -t {service} -s rr"), format!("-a -t {service} -r {endpoint}:80 -m")]
        {
            let mut command = lab.node.command("ipvsadm").unwrap();
            command.args(arguments.split(' '));
            run(command);
        }
    }
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    Some((lab, pod))
}

fn start_slowly(lab: &Lab, further: &[&str]) -> Agent {
    let mut agent = lab.begin_agent(further);
    agent.wait_ready(EMULATED).unwrap();
    agent
}

#[test]
fn what_ipvs_forwards_to_imds_is_prohibited_and_so_is_what_it_has_cached() {
    let test = "what_ipvs_forwards_to_imds_is_prohibited_and_so_is_what_it_has_cached";
    let Some((lab, pod)) = lab_with_ipvs(test) else { return };
    assert_open(&lab, &pod, "without an agent");
    // What passed `iif lo` without more: the fault.
    add_earlier_rules(&lab);
    assert_open(&lab, &pod, "by the rules of an earlier agent");
    let mut held = SERVICE.map(|address| Held::of_pod(&pod, address));
    for held in &mut held {
        assert_eq!(held.send(), "alive");
    }

    let mut agent = start_slowly(&lab, &[]);
    let before = packets(&lab, &pod);
    assert_service_is_shut(&lab, &pod, before, "with the agent");
    for held in &mut held {
        assert_ne!(held.send(), "alive");
    }
    assert_eq!(packets(&lab, &pod), before, "by connections that IPVS knew");
    host_gets_the_instance_id(&lab);
    // A process of the node's by the Service is refused too: IPVS routes its packets in the same way.
    for address in SERVICE {
        let attempt = lab.node.ask_once(&by_service(address)).unwrap();
        assert_eq!(attempt.status, None, "{attempt:?}");
    }

    agent.kill().unwrap();
    assert_service_is_shut(&lab, &pod, before, "after kill -9");
    lab.uninstall().unwrap();
    assert_eq!(rules(lab.node.netns()), Vec::<String>::new());
    assert_open(&lab, &pod, "after it was uninstalled");
}

#[test]
fn what_ipvs_forwards_to_imds_ends_at_the_uplinks_too() {
    let test = "what_ipvs_forwards_to_imds_ends_at_the_uplinks_too";
    let Some((lab, pod)) = lab_with_ipvs(test) else { return };
    let before = assert_open(&lab, &pod, "without an agent");
    let _agent = start_slowly(&lab, &["--guard=uplink"]);
    let before = before.max(packets(&lab, &pod));
    assert_service_is_shut(&lab, &pod, before, "with the uplink guard alone");
    host_gets_the_instance_id(&lab);
}

#[test]
fn what_netfilter_forwards_to_imds_is_prohibited() {
    let Some(lab) = lab::node_test!() else { return };
    if lacks(&lab, "nft", &["--version"]) {
        return;
    }
    // kube-proxy's iptables and nftables modes: the destination is translated before the packet is routed.
    let [v4, v6] = SERVICE;
    nft(
        &lab,
        &format!(
            "table inet services {{ chain prerouting {{ type nat hook prerouting priority -100;\n\
             ip daddr {v4} tcp dport 80 dnat ip to {IMDS_V4}\n\
             ip6 daddr {v6} tcp dport 80 dnat ip6 to {IMDS_V6}\n}}\n}}"
        ),
    );
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    assert_open(&lab, &pod, "without an agent");
    let _agent = start_slowly(&lab, &[]);
    let before = packets(&lab, &pod);
    assert_service_is_shut(&lab, &pod, before, "with the agent");
}

#[test]
fn a_node_that_checks_where_answers_come_from_gets_those_of_imds() {
    let Some(lab) = lab::node_test!() else { return };
    let netns = lab.node.netns();
    for interface in ["all", "eth0"] {
        netns.sysctl(&format!("ipv4/conf/{interface}/rp_filter"), "1").unwrap();
    }
    let _agent = start_slowly(&lab, &[]);
    host_gets_the_instance_id(&lab);
}

#[test]
fn a_node_whose_netfilter_looks_the_address_up_again_reaches_imds() {
    let Some(lab) = lab::node_test!() else { return };
    if lacks(&lab, "nft", &["--version"]) {
        return;
    }
    // A packet whose mark changes is routed again, and firewalld looks up where answers should come in.
    let ruleset = "table inet node {\n\
         chain output { type route hook output priority -150; tcp dport 80 meta mark set 0x7; }\n\
         chain prerouting { type filter hook prerouting priority -290;\n\
         fib saddr . iif oif missing counter drop\n}\n}";
    nft(&lab, ruleset);
    host_gets_the_instance_id(&lab);
    let _agent = start_slowly(&lab, &[]);
    host_gets_the_instance_id(&lab);
}

#[test]
fn an_earlier_agents_rules_are_replaced_whether_they_come_before_or_after() {
    let Some(lab) = lab::node_test!() else { return };
    let pod = lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap();
    add_earlier_rules(&lab);
    let flood = super::flood(&pod);
    let mut agent = start_slowly(&lab, &[]);
    let whole = rules(lab.node.netns());
    assert_eq!(whole, super::expected_rules(5));
    host_gets_the_instance_id(&lab);

    // An earlier agent that still runs adds its own again: each then is behind those that have more in them, for which
    // the kernel takes it when it is to be removed.
    agent.kill().unwrap();
    add_earlier_rules(&lab);
    host_gets_the_instance_id(&lab);
    let mut agent = start_slowly(&lab, &[]);
    assert_eq!(rules(lab.node.netns()), whole, "at once, and not by a sweep");
    host_gets_the_instance_id(&lab);
    super::end(flood);
    assert_eq!(packets(&lab, &pod), 0);

    agent.kill().unwrap();
    add_earlier_rules(&lab);
    lab.uninstall().unwrap();
    assert_eq!(rules(lab.node.netns()), Vec::<String>::new());
}

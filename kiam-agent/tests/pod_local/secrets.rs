//! What others on the node and beside the pod see of it.

use std::{
    mem::MaybeUninit,
    net::{Ipv4Addr, Ipv6Addr},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use lab::{
    Lab, LabPod, Neighbour, Netns, PodSpec, eventually,
    pod_client::{
        Imds, Options, Via,
        hostile::{Program, spoof::Station},
    },
};
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with, sockopt,
};

use super::{INSIDE, ON_THE_NODE, pod_inside, port_inside};

/// What the STS stand-in puts into secrets, and what only requests to the metadata service and answers have.
const SECRETS: [&str; 5] =
    ["secret-of-", "token-of-", "AccessKeyId", "metadata-token", "security-credentials"];
/// The bridge's address, which is its pods' gateway.
const GATEWAY: &str = "10.88.0.1";
/// A packet socket on all interfaces of a namespace, and what came to it.
struct Sniffer {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u8>>,
}

// === impl Sniffer ===

impl Sniffer {
    fn start(netns: &Netns) -> Self {
        let socket = || {
            let flags = SocketFlags::CLOEXEC;
            socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(eth::ALL)).unwrap()
        };
        let socket = netns.enter(socket).unwrap();
        sockopt::set_socket_recv_buffer_size_force(&socket, 64 << 20).unwrap();
        let wait = Some(Duration::from_millis(50));
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, wait).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let told = ended.clone();
        let thread = thread::spawn(move || {
            let mut seen = Vec::new();
            let mut packet = [MaybeUninit::uninit(); 65536];
            loop {
                // At the end, what waits and no more: a spoofer does not stop sending.
                let last = told.load(Ordering::Relaxed);
                let flags = if last { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
                match recv(&socket, &mut packet, flags) {
                    Ok(((bytes, _), _)) => {
                        seen.extend_from_slice(bytes);
                        // So that nothing is read across packets.
                        seen.push(0);
                    }
                    Err(_) if last => return seen,
                    // Nothing for a while.
                    Err(_) => {}
                }
            }
        });
        Self { ended, thread }
    }

    /// How many bytes it saw, and which secrets in them.
    fn finish(self) -> (usize, Vec<&'static str>) {
        self.ended.store(true, Ordering::Relaxed);
        let seen = self.thread.join().unwrap();
        let has = |secret: &&str| {
            let secret = secret.as_bytes();
            seen.windows(secret.len()).any(|part| part.eq_ignore_ascii_case(secret))
        };
        (seen.len(), SECRETS.into_iter().filter(has).collect())
    }
}

/// Asks by every way.
fn ask_by_every_way(lab: &Lab, pod: &LabPod, role: &str) {
    for via in [Via::V4, Via::V4Mapped, Via::V6] {
        for imds in [Imds::V1, Imds::V2] {
            let asked = Options { via, imds, ..Options::default() };
            lab.assert_role(&pod.ask_once(&asked).unwrap(), role);
        }
    }
}

#[test]
fn a_sniffer_on_the_node_sees_no_secret() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let roles = ["orders", "reports"];
    let agent = lab.agent(&[]);
    let pods = roles.map(|role| (role, pod_inside(&lab, role)));
    for (role, pod) in &pods {
        // From here on there is nothing to ask STS for, whose answers cross the node in the clear in the lab.
        ask_by_every_way(&lab, pod, role);
    }
    let before = (agent.verdicts(INSIDE), agent.verdicts(ON_THE_NODE));
    let sniffer = Sniffer::start(lab.node.netns());
    for (role, pod) in &pods {
        ask_by_every_way(&lab, pod, role);
    }
    // Asked over the node's loopback, which the sniffer must see.
    let after = (agent.verdicts(INSIDE), agent.verdicts(ON_THE_NODE));
    let (bytes, secrets) = sniffer.finish();
    assert!(bytes > 0, "the sniffer saw nothing at all");
    assert_eq!(secrets, [""; 0]);
    assert!(after.0 >= before.0 + 12 && after.1 == before.1, "{before:?}, {after:?}");
    drop(agent);
    // The same sniffer on the other path: it would have seen them.
    let _agent = lab.agent(&["--path=node"]);
    for (role, pod) in &pods {
        ask_by_every_way(&lab, pod, role);
    }
    let sniffer = Sniffer::start(lab.node.netns());
    for (role, pod) in &pods {
        ask_by_every_way(&lab, pod, role);
    }
    assert_eq!(sniffer.finish().1, SECRETS);
}

/// A pod whose link is a port of the bridge `cni0`, as the bridge plugin and kind make them.
fn pod_on_bridge(lab: &Lab, role: &str, number: u8) -> LabPod {
    let v4 = Ipv4Addr::new(10, 88, 0, number);
    let spec = PodSpec::new("shop", role).role(role);
    let spec = spec.addresses(v4, Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, number.into()));
    let pod = lab.pod(spec).unwrap();
    let link = pod.link().unwrap();
    let to_bridge = format!(
        "route del {v4} dev {link}\n\
         neigh del {v4} dev {link}\n\
         link set {link} address 0a:58:00:00:01:{number:02x}\n\
         link set {link} master cni0\n"
    );
    lab.node.netns().ip(&to_bridge).unwrap();
    let by_gateway =
        format!("addr add {v4}/24 dev eth0\nroute replace default via {GATEWAY} dev eth0\n");
    pod.netns().ip(&by_gateway).unwrap();
    pod
}

/// What `ip neigh` says of `address` on `device`.
fn neighbour(netns: &Netns, address: &str, device: &str) -> String {
    let mut command = netns.command("ip");
    let output = command.args(["neigh", "show", address, "dev", device]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn mac(netns: &Netns, device: &str) -> String {
    let mut command = netns.command("ip");
    let output = command.args(["-json", "link", "show", "dev", device]).output().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    shown[0]["address"].as_str().unwrap().to_owned()
}

/// Puts `spoofer` between `victim` and the gateway until what is returned is dropped.
fn spoof(lab: &Lab, spoofer: &LabPod, victim: &LabPod) -> Neighbour {
    // It passes on what it gets, and nobody tells the victim of the shorter way.
    spoofer.netns().sysctl("ipv4/ip_forward", "1").unwrap();
    for scope in ["all", "eth0"] {
        spoofer.netns().sysctl(&format!("ipv4/conf/{scope}/send_redirects"), "0").unwrap();
    }
    let own = mac(spoofer.netns(), "eth0");
    let station = |address: Ipv4Addr, mac| Station { address, mac };
    let stations = [
        station(victim.v4(), mac(victim.netns(), "eth0")),
        station(GATEWAY.parse().unwrap(), mac(lab.node.netns(), "cni0")),
    ];
    let spoofing = spoofer.hostile(&Program::Spoof { stations, own: own.clone() }).unwrap();
    let gateway = || neighbour(victim.netns(), GATEWAY, "eth0");
    let back = || neighbour(lab.node.netns(), &victim.v4().to_string(), "cni0");
    eventually("both are deceived", || gateway().contains(&own) && back().contains(&own));
    spoofing
}

#[test]
fn a_spoofer_on_the_bridge_sees_no_secret() {
    let Some(lab) = lab::pod_local_test!() else { return };
    let bridge =
        format!("link add cni0 type bridge\naddr add {GATEWAY}/24 dev cni0\nlink set cni0 up\n");
    lab.node.netns().ip(&bridge).unwrap();
    let agent = lab.agent(&[]);
    let victim = pod_on_bridge(&lab, "orders", 2);
    let spoofer = pod_on_bridge(&lab, "reports", 3);
    // Each has to know the other's true place before there is anything to forge.
    let gateway = Options { to: Some(GATEWAY.parse().unwrap()), ..Options::default() };
    let attempt = victim.ask_once(&gateway).unwrap();
    assert_eq!(attempt.error.as_deref(), Some("ECONNREFUSED"), "{attempt:?}");
    port_inside(&lab, &victim);
    let ways = || {
        for imds in [Imds::V1, Imds::V2] {
            let asked = Options { imds, ..Options::default() };
            lab.assert_role(&victim.ask_once(&asked).unwrap(), "orders");
        }
    };
    ways();
    let _spoofing = spoof(&lab, &spoofer, &victim);
    let sniffer = Sniffer::start(spoofer.netns());
    ways();
    assert!(neighbour(victim.netns(), GATEWAY, "eth0").contains(&mac(spoofer.netns(), "eth0")));
    let (bytes, secrets) = sniffer.finish();
    assert!(bytes > 0, "the sniffer saw nothing at all");
    assert_eq!(secrets, [""; 0]);
    drop(agent);
    // What it would have seen on the other path, to the same agent.
    let _agent = lab.agent(&["--path=node"]);
    let sniffer = Sniffer::start(spoofer.netns());
    ways();
    assert_eq!(sniffer.finish().1, SECRETS);
}

/// Drops whatever comes from the pod, to the node as well as through it.
fn deny_egress(lab: &Lab, pod: &LabPod) {
    let link = pod.link().unwrap();
    let rules = format!(
        "table inet network_policy {{\n\
         chain forward {{ type filter hook forward priority 0; iifname {link} drop; }}\n\
         chain input {{ type filter hook input priority 0; iifname {link} drop; }}\n}}\n"
    );
    let mut command = lab.node.command("nft").unwrap();
    let output = command.arg(rules).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_policy_that_denies_all_egress_does_not_touch_it() {
    if lab::skip!() || lab::no_netns_cookies() {
        return;
    }
    if let Err(error) = Command::new("nft").arg("--version").output() {
        assert!(std::env::var_os(lab::NO_SKIP).is_none(), "nft: {error}");
        return eprintln!(
            "skipped: a_policy_that_denies_all_egress_does_not_touch_it: nft: {error}"
        );
    }
    let lab = Lab::start().unwrap();
    let agent = lab.agent(&[]);
    let pod = pod_inside(&lab, "orders");
    deny_egress(&lab, &pod);
    ask_by_every_way(&lab, &pod, "orders");
    drop(agent);
    let _agent = lab.agent(&["--path=node"]);
    let asked = Options { timeout_ms: 500, ..Options::default() };
    let attempt = pod.ask_once(&asked).unwrap();
    assert_eq!(attempt.error.as_deref(), Some("ETIMEDOUT"), "{attempt:?}");
}

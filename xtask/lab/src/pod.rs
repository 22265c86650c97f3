//! A pod as the kernel sees it: a network namespace, a veth routed as Calico and the VPC CNI do, a cgroup as the kubelet's.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::time::Instant;

use super::{
    cgroup::{Cgroup, Layout, join},
    netns::{Netns, has_ipv6},
    node::{NODE_V4, NODE_V6, Node},
};

/// The pods' gateway: no such host, the node's end of the veth answers for it.
const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";
const HOST_MAC: &str = "ee:ee:ee:ee:ee:ee";
/// How long a link may take to be up: milliseconds, and more only on a machine that is very busy.
const LINK_LIMIT: Duration = Duration::from_secs(60);

/// What a pod is to be; the rest is chosen.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`; absent: one of its own.
    pub uid: Option<String>,
    /// Its addresses; absent: the next free ones, `10.77.1.n` and `fd77:1::n`.
    pub addresses: Option<(Ipv4Addr, Ipv6Addr)>,
    /// Where its cgroup is.
    pub layout: Layout,
    /// `spec.hostNetwork`: it shares the node's namespace and addresses.
    pub host_network: bool,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// `metadata.annotations`.
    pub annotations: Vec<(String, String)>,
    /// Kind of the controller that made it, if one did.
    pub controller: Option<String>,
}

/// A running sandbox. Drop kills what runs in it and takes it away.
#[derive(Debug)]
pub struct LabPod {
    spec: PodSpec,
    addresses: (Ipv4Addr, Ipv6Addr),
    netns: Netns,
    cgroup: Cgroup,
    slice: Cgroup,
    link: Option<String>,
    node: Node,
    pause: Option<Child>,
}

// === impl PodSpec ===

impl PodSpec {
    /// A pod of QoS class burstable, on the systemd driver, without a role.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: None,
            addresses: None,
            layout: Layout::default(),
            host_network: false,
            service_account: "default".to_owned(),
            annotations: Vec::new(),
            controller: None,
        }
    }

    /// Annotates it with the role it is to have.
    #[must_use]
    pub fn role(self, role: &str) -> Self {
        self.annotation("iam.amazonaws.com/role", role)
    }

    /// Gives it a UID, when it has none.
    pub fn with_uid(mut self) -> Result<Self> {
        if self.uid.is_none() {
            let (high, low) = (random()? >> 96, random()? & 0xffff_ffff_ffff);
            self.uid = Some(format!("{high:08x}-0000-4000-8000-{low:012x}"));
        }
        Ok(self)
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Says that a controller of this kind made it.
    #[must_use]
    pub fn controller(mut self, kind: &str) -> Self {
        self.controller = Some(kind.to_owned());
        self
    }

    /// Gives it addresses that another pod has or had.
    #[must_use]
    pub fn addresses(mut self, v4: Ipv4Addr, v6: Ipv6Addr) -> Self {
        self.addresses = Some((v4, v6));
        self
    }

    /// Puts it on the host's network.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// Gives it a service account other than `default`.
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    /// Chooses where its cgroup is.
    #[must_use]
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }
}

// === impl LabPod ===

impl LabPod {
    /// Makes the sandbox on `node`: namespace, addresses, routes, cgroup.
    pub fn start(node: &Node, spec: PodSpec) -> Result<Self> {
        let spec = spec.with_uid()?;
        let number = node.next_pod();
        let uid = spec.uid.as_deref().unwrap_or_default();
        let container = spec.layout.container(uid, &format!("{:032x}", random()?));
        let container = node.kubepods().join(container);
        let slice = container.parent().context("a container's cgroup is below its pod's")?;
        let slice = Cgroup::create(slice)?;
        let cgroup = Cgroup::create(container)?;
        if spec.host_network {
            let (netns, addresses) = (node.netns().clone(), (NODE_V4, NODE_V6));
            return Ok(Self {
                spec,
                addresses,
                netns,
                cgroup,
                slice,
                link: None,
                node: node.clone(),
                pause: None,
            });
        }
        let netns = Netns::create()?;
        let [high, low] = number.to_be_bytes();
        let chosen = (
            Ipv4Addr::new(10, 77, high.saturating_add(1), low),
            Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, number),
        );
        let addresses = spec.addresses.unwrap_or(chosen);
        let link = format!("pod{number}");
        connect(node, &netns, &link, addresses)
            .with_context(|| format!("wiring pod {}/{}", spec.namespace, spec.name))?;
        let (link, node) = (Some(link), node.clone());
        Ok(Self { spec, addresses, netns, cgroup, slice, link, node, pause: None })
    }

    /// Starts what holds a sandbox in Kubernetes: a process that does nothing, first and as long as the pod is there,
    /// in a cgroup of its own.
    pub fn pause(&mut self) -> Result<()> {
        let uid = self.uid();
        let container = self.spec.layout.container(uid, &format!("{:032x}", random()?));
        let cgroup = self.node.kubepods().join(container);
        fs::create_dir_all(&cgroup)?;
        let mut command = self.netns.command("sleep");
        // It is removed with the pod's.
        join(&cgroup, &mut command)?;
        command.arg("infinity").stdin(Stdio::null());
        self.pause = Some(command.spawn().context("starting the pause process")?);
        Ok(())
    }

    /// What was asked for.
    #[must_use]
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.spec.uid.as_deref().expect("a sandbox is made with a UID")
    }

    /// Its IPv4 address; the node's for a pod on the host's network.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.addresses.0
    }

    /// Its IPv6 address; the node's for a pod on the host's network.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.addresses.1
    }

    /// Both.
    #[must_use]
    pub fn ips(&self) -> [IpAddr; 2] {
        [self.v4().into(), self.v6().into()]
    }

    /// Its network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The node's end of its link; `None` on the host's network.
    #[must_use]
    pub fn link(&self) -> Option<&str> {
        self.link.as_deref()
    }

    /// Its container's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The pod's cgroup, which its containers' are below.
    #[must_use]
    pub fn slice(&self) -> &Cgroup {
        &self.slice
    }

    /// Gives the pod a further address, and the node the route to it; the API hears nothing of it.
    pub fn take_address(&self, address: Ipv4Addr) -> Result<()> {
        let link = self.link.as_deref().context("a pod on the host's network has no link")?;
        self.netns.ip(&format!("addr add {address}/32 dev eth0"))?;
        self.node.netns().ip(&format!("route add {address} via {} dev {link} onlink", self.v4()))
    }

    /// Gives itself another pod's address, as root in the pod can; the node hears nothing of it.
    pub fn forge_address(&self, address: Ipv4Addr) -> Result<()> {
        self.netns.ip(&format!("addr add {address}/32 dev eth0"))
    }

    /// Makes the node send what is for `address` here, its own or another pod's, as when two pods got the same.
    pub fn attract(&self, address: Ipv4Addr) -> Result<()> {
        let link = self.link.as_deref().context("a pod on the host's network has no link")?;
        let own = address == self.v4();
        let by = if own { String::new() } else { format!("via {} onlink ", self.v4()) };
        self.node.netns().ip(&format!("route replace {address} {by}dev {link}"))
    }

    /// A command that will run inside the pod: its network namespace and its cgroup.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = self.netns.command(program);
        self.cgroup.adopt(&mut command)?;
        Ok(command)
    }
}

impl Drop for LabPod {
    fn drop(&mut self) {
        if let Err(error) = self.slice.kill() {
            eprintln!("lab: {error:#}");
        }
        if let Some(mut pause) = self.pause.take() {
            let _ = pause.wait();
        }
        // The namespace goes some time after its last user; its address must be free at once.
        if let Some(link) = &self.link
            && let Err(error) = self.node.netns().ip(&format!("link del {link}"))
        {
            eprintln!("lab: {error:#}");
        }
    }
}

/// Routes `addresses` to the pod and everything of the pod to the node. The neighbours are fixed, as the VPC CNI does.
fn connect(node: &Node, pod: &Netns, link: &str, addresses: (Ipv4Addr, Ipv6Addr)) -> Result<()> {
    let (v4, v6) = addresses;
    let [.., high, low] = v6.octets();
    let mac = format!("0a:58:0a:4d:{high:02x}:{low:02x}");
    let host = node.netns();
    host.ip(&format!(
        "link add {link} address {HOST_MAC} type veth peer name eth0 address {mac} netns {}\n\
         link set {link} up\n",
        pod.path()
    ))?;
    host.sysctl(&format!("ipv4/conf/{link}/proxy_arp"), "1")?;
    pod.ip(&format!(
        "link set eth0 up\n\
         addr add {v4}/32 dev eth0\n\
         neigh add {GATEWAY_V4} lladdr {HOST_MAC} dev eth0 nud permanent\n\
         route add {GATEWAY_V4} dev eth0 scope link\n\
         route add default via {GATEWAY_V4} dev eth0\n"
    ))?;
    host.ip(&format!(
        "neigh replace {v4} lladdr {mac} dev {link} nud permanent\n\
         route add {v4} dev {link}\n"
    ))?;
    if has_ipv6() {
        connect_v6(host, pod, link, v6, &mac)?;
    }
    until_up(host, link)
}

fn connect_v6(host: &Netns, pod: &Netns, link: &str, v6: Ipv6Addr, mac: &str) -> Result<()> {
    host.ip(&format!("addr add {GATEWAY_V6}/128 dev {link} nodad\n"))?;
    pod.ip(&format!(
        "addr add {v6}/128 dev eth0 nodad\n\
         neigh add {GATEWAY_V6} lladdr {HOST_MAC} dev eth0 nud permanent\n\
         route add ::/0 via {GATEWAY_V6} dev eth0\n"
    ))?;
    host.ip(&format!(
        "neigh replace {v6} lladdr {mac} dev {link} nud permanent\n\
         route add {v6} dev {link}\n"
    ))
}

/// Waits until the node's end of a link takes packets. That end was up first, and the kernel makes it work a little
/// after the pod's; until then it drops what is sent, such as the SYN-ACK for the pod's first connect.
fn until_up(host: &Netns, link: &str) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < LINK_LIMIT {
        let mut ip = host.command("ip");
        let shown = ip.args(["-oneline", "link", "show", "dev", link]).output();
        let shown = shown.context("starting ip (iproute2)")?.stdout;
        let shown = String::from_utf8_lossy(&shown);
        if shown.contains(" state UP ") && !shown.contains(" qdisc noop ") {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("the node's end {link} is not up after {LINK_LIMIT:?}")
}

fn random() -> Result<u128> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("asking for random bytes")?;
    Ok(u128::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::TcpStream, process::Stdio};

    use super::*;
    use crate::{IMDS_V4, IMDS_V6};

    #[test]
    fn a_pod_runs_in_its_own_namespace_and_cgroup() {
        if crate::skip!() {
            return;
        }
        let node = Node::start().unwrap();
        let pod = node.pod(PodSpec::new("shop", "reader")).unwrap();
        let output = pod
            .command("sh")
            .unwrap()
            .args(["-c", "cat /proc/self/cgroup; ip -brief addr"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let uid = pod.uid().replace('-', "_");
        assert!(
            text.contains(&format!("kubepods-burstable-pod{uid}.slice/cri-containerd-")),
            "{text}"
        );
        assert!(text.contains(&format!("{}/32", pod.v4())), "{text}");
        assert!(text.contains(&format!("{}/128", pod.v6())), "{text}");
    }

    #[test]
    fn pods_reach_the_node_and_the_metadata_service_and_go_without_trace() {
        if crate::skip!() {
            return;
        }
        let node = Node::start().unwrap();
        let pod = node.pod(PodSpec::new("shop", "reader")).unwrap();
        let host_pod = node.pod(PodSpec::new("kube-system", "proxy").host_network()).unwrap();
        let places = [
            (node.netns(), IpAddr::from(NODE_V4)),
            (node.netns(), NODE_V6.into()),
            (node.imds_netns(), IMDS_V4.into()),
            (node.imds_netns(), IMDS_V6.into()),
        ];
        for (netns, address) in places {
            let listener = netns.listen((address, 80).into()).unwrap();
            for (from, pod) in [("pod", &pod), ("host", &host_pod)] {
                let stream = pod.netns().enter(|| TcpStream::connect((address, 80))).unwrap();
                let mut stream =
                    stream.unwrap_or_else(|error| panic!("{from} to {address}: {error}"));
                stream.write_all(b"x").unwrap();
                let (_, peer) = listener.accept().unwrap();
                assert!(pod.ips().contains(&peer.ip()), "{from} came as {peer} at {address}");
            }
        }
        let slice = pod.slice().path().to_owned();
        drop(pod);
        assert!(!slice.exists());
        let (root, folder) = (node.root_cgroup().to_owned(), node.folder().to_owned());
        drop((host_pod, node));
        assert!(!root.exists() && !folder.exists());
    }
}

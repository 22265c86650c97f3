//! The self-test's sandbox: a cgroup, and a network namespace that is connected to the node like a pod's.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{fs::MetadataExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::sys::{Walk, inside, netlink::Netlink, netns};

/// The prefix of the client's cgroup, below that of the agent's pod. Scans of that pod skip it.
pub const CGROUP_PREFIX: &str = "kiam-selftest-";
/// The client's link in its namespace.
const LINK: &str = "eth0";
/// The loopback link's index in every namespace (`LOOPBACK_IFINDEX` in the kernel).
const LOOPBACK: u32 = 1;
/// The client's gateways. No host has these addresses; the node's end of the link answers.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 76, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The hardware addresses of both ends: locally administered, and only used on this link.
const NODE_MAC: [u8; 6] = [0x02, b'k', b'i', b'a', b'm', 1];
const CLIENT_MAC: [u8; 6] = [0x02, b'k', b'i', b'a', b'm', 2];
/// The most cgroups among which leftovers are searched.
const SWEPT: usize = 4096;
/// Attempts to find free addresses: during a takeover two agents have a sandbox.
const TRIES: u32 = 16;

/// A temporary pod, as far as the kernel is concerned. Dropping it removes the cgroup and the namespace.
#[derive(Debug)]
pub(super) struct Sandbox {
    netns: File,
    cookie: Option<u64>,
    cgroup: PathBuf,
    cgroup_id: u64,
    addresses: [IpAddr; 2],
}

// === impl Sandbox ===

impl Sandbox {
    /// Creates a sandbox whose cgroup is below `parent`.
    pub(super) fn create(parent: &Path) -> io::Result<Self> {
        let cgroup =
            parent.join(format!("{CGROUP_PREFIX}{}-{:08x}", std::process::id(), fastrand::u32(..)));
        fs::create_dir(&cgroup)?;
        // From here on Drop removes it.
        let mut sandbox = Self {
            netns: new_netns()?,
            cookie: None,
            cgroup_id: fs::metadata(&cgroup)?.ino(),
            cgroup,
            addresses: [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        sandbox.cookie = inside(&sandbox.netns, || Ok(netns::own_cookie().ok()))?;
        sandbox.wire()?;
        Ok(sandbox)
    }

    /// The cgroup's id.
    pub(super) fn cgroup_id(&self) -> u64 {
        self.cgroup_id
    }

    /// The network namespace.
    pub(super) fn netns(&self) -> &File {
        &self.netns
    }

    /// The network namespace's cookie, from kernel 5.14 on.
    pub(super) fn cookie(&self) -> Option<u64> {
        self.cookie
    }

    /// The client's addresses.
    pub(super) fn addresses(&self) -> [IpAddr; 2] {
        self.addresses
    }

    /// Runs `command` in the sandbox, to its end.
    pub(super) fn run(&self, command: &mut Command) -> io::Result<Output> {
        let procs = File::options().write(true).open(self.cgroup.join("cgroup.procs"))?;
        let netns = self.netns.try_clone()?;
        let enter = move || {
            // "0" is the writer itself.
            rustix::io::write(&procs, b"0")?;
            Ok(move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?)
        };
        // SAFETY: between fork and exec two system calls: no allocation, no lock.
        unsafe { command.pre_exec(enter) };
        command.stdin(Stdio::null()).output()
    }

    /// Connects the namespace with the node's.
    fn wire(&mut self) -> io::Result<()> {
        let node = Netlink::route()?;
        let link = format!("kiam{:08x}", fastrand::u32(..));
        node.order(
            RouteNetlinkMessage::NewLink(veth(&link, &self.netns)),
            NLM_F_CREATE | NLM_F_EXCL,
        )?;
        let index = index(&link)?;
        let mut tries = 0;
        loop {
            self.addresses = addresses();
            match connect_node(&node, index, &self.addresses) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < TRIES => {
                    tries += 1;
                }
                done => break done?,
            }
        }
        let addresses = self.addresses;
        inside(&self.netns, move || connect_client(&addresses))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The link goes with the namespace. The cgroup is empty: the client has ended.
        let _ = fs::remove_dir(&self.cgroup);
    }
}

/// Removes the cgroups of self-tests below `parent` whose agents were killed.
pub(super) fn sweep(walk: &mut Walk<'_>, parent: &Path) {
    for path in walk.children(parent, SWEPT).unwrap_or_default() {
        let name = path.file_name().unwrap_or_default();
        if name.as_encoded_bytes().starts_with(CGROUP_PREFIX.as_bytes()) {
            // An agent that uses the cgroup at the moment recreates it.
            let _ = fs::remove_dir(path);
        }
    }
}

fn new_netns() -> io::Result<File> {
    let made = thread::Builder::new().spawn(|| {
        // SAFETY: NEWNET does not unshare the descriptor table, the one flag that is unsafe.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        File::open("/proc/thread-self/ns/net")
    })?;
    made.join().map_err(|_| io::Error::other("the thread panicked"))?
}

/// Random addresses of ranges that are unlikely to be in use on this node.
fn addresses() -> [IpAddr; 2] {
    let [high, low] = fastrand::u16(..).to_be_bytes();
    let (high, low) = (76 + (high & 1), low.clamp(2, 254));
    let group = u16::from_be_bytes([high, low]);
    let v6 = Ipv6Addr::new(0xfd6b, 0x6961, 0x6d00, fastrand::u16(..), 0, 0, 0, group);
    [Ipv4Addr::new(169, 254, high, low).into(), v6.into()]
}

fn veth(name: &str, netns: &File) -> LinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(LINK.to_owned()),
        LinkAttribute::Address(CLIENT_MAC.to_vec()),
        LinkAttribute::NetNsFd(netns.as_raw_fd()),
    ];
    let mut link = LinkMessage::default();
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(NODE_MAC.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    link
}

fn index(name: &str) -> io::Result<u32> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(rustix::net::netdevice::name_to_index(&socket, name)?)
}

/// The node's side: a route and a neighbour for each of the client's addresses. No address of the link's own.
fn connect_node(node: &Netlink, index: u32, addresses: &[IpAddr; 2]) -> io::Result<()> {
    for address in addresses {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let to = RouteAttribute::Destination(destination(*address));
        let done = node
            .order(
                RouteNetlinkMessage::NewRoute(route(*address, prefix, index, vec![to])),
                NLM_F_CREATE | NLM_F_EXCL,
            )
            .and_then(|()| neighbour(node, index, *address, CLIENT_MAC));
        unless_family_is_off(*address, done)?;
    }
    Ok(())
}

/// The client's side, on a thread in its namespace.
fn connect_client(addresses: &[IpAddr; 2]) -> io::Result<()> {
    let netlink = Netlink::route()?;
    let index = index(LINK)?;
    for link in [LOOPBACK, index] {
        let mut up = LinkMessage::default();
        up.header.index = link;
        up.header.flags = LinkFlags::Up;
        up.header.change_mask = LinkFlags::Up;
        netlink.order(RouteNetlinkMessage::SetLink(up), 0)?;
    }
    for (address, gateway) in addresses.iter().zip([IpAddr::from(GATEWAY_V4), GATEWAY_V6.into()]) {
        let own = RouteNetlinkMessage::NewAddress(own_address(*address, index));
        let via = vec![RouteAttribute::Gateway(destination(gateway))];
        let default = RouteNetlinkMessage::NewRoute(route(*address, 0, index, via));
        let done = netlink
            .order(own, NLM_F_CREATE | NLM_F_EXCL)
            .and_then(|()| neighbour(&netlink, index, gateway, NODE_MAC))
            .and_then(|()| netlink.order(default, NLM_F_CREATE | NLM_F_EXCL));
        unless_family_is_off(*address, done)?;
    }
    Ok(())
}

/// Ignores IPv6 errors of a node without IPv6, which is tested by IPv4 alone.
fn unless_family_is_off(address: IpAddr, done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error)
            if address.is_ipv6()
                && matches!(
                    error.raw_os_error(),
                    Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES | libc::EINVAL)
                ) =>
        {
            Ok(())
        }
        done => done,
    }
}

fn own_address(address: IpAddr, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    // Duplicate address detection would keep it unusable for a second.
    message.header.flags = AddressHeaderFlags::Nodad;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

fn route(of: IpAddr, prefix: u8, index: u32, mut attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(of);
    message.header.destination_prefix_length = prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    let via = attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)));
    message.header.scope = if via { RouteScope::Universe } else { RouteScope::Link };
    message.header.flags = if via { RouteFlags::Onlink } else { RouteFlags::empty() };
    attributes.push(RouteAttribute::Oif(index));
    message.attributes = attributes;
    message
}

fn neighbour(netlink: &Netlink, index: u32, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    let to = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(to),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    netlink.order(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE)
}

fn destination(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

//! The node: its network namespace, the real IMDS's place beside it, the kubelet's cgroup and a bpffs of its own.

use std::{
    ffi::CString,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

use super::{
    cgroup::{self, Cgroup},
    netns::{Netns, has_ipv6},
    pod::{LabPod, PodSpec},
    sweep,
};

/// The node's name in the Kubernetes API.
pub const NODE_NAME: &str = "lab-node";
/// The node's own address, where the agent listens.
pub const NODE_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The same in IPv6.
pub const NODE_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// Where EC2 puts the instance metadata service.
pub const IMDS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The same in IPv6.
pub const IMDS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// One node. Clones are handles to the same; the last one takes everything away.
#[derive(Clone, Debug)]
pub struct Node(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    netns: Netns,
    imds: Netns,
    // Before the folder, so that what holds the mount is killed first.
    agent: Cgroup,
    kubepods: Cgroup,
    root: Cgroup,
    bpffs: PathBuf,
    folder: Folder,
    next_pod: AtomicU16,
}

/// The node's files: the bpffs mount, the agent's state, what servers write for it.
#[derive(Debug)]
struct Folder(PathBuf);

// === impl Node ===

impl Node {
    /// Makes a node without pods: addresses, forwarding, routes to the metadata service, cgroups, bpffs.
    pub fn start() -> Result<Self> {
        sweep::leftovers();
        let name = sweep::unique_name();
        let folder = Folder::create(&name)?;
        let root = Cgroup::create(cgroup::mount_point()?.join(&name))?;
        let kubepods = Cgroup::create(root.path().join("kubepods.slice"))?;
        let agent = Cgroup::create(root.path().join("system.slice/kiam-agent.service"))?;
        let (netns, imds) = (Netns::create()?, Netns::create()?);
        connect(&netns, &imds)?;
        let (bpffs, next_pod) = (folder.0.join("bpf"), AtomicU16::new(2));
        Ok(Self(Arc::new(Inner { netns, imds, agent, kubepods, root, bpffs, folder, next_pod })))
    }

    /// This machine itself, which is to be the lab's alone: its network, cgroups and bpffs, with the metadata service
    /// beside it. systemd and the runtime make the pods' cgroups.
    pub fn of_machine() -> Result<Self> {
        let folder = Folder::create(&sweep::unique_name())?;
        let mount = cgroup::mount_point()?;
        let [agent, kubepods] = ["system.slice/kiam-lab.service", "kubepods.slice"]
            .map(|name| Cgroup::of_others(mount.join(name)));
        let (netns, imds) = (Netns::current()?, Netns::create()?);
        connect(&netns, &imds)?;
        let (bpffs, next_pod) = (PathBuf::from("/sys/fs/bpf"), AtomicU16::new(2));
        let root = Cgroup::of_others(mount);
        Ok(Self(Arc::new(Inner { netns, imds, agent, kubepods, root, bpffs, folder, next_pod })))
    }

    /// Makes a pod that the Kubernetes API knows nothing of.
    pub fn pod(&self, spec: PodSpec) -> Result<LabPod> {
        LabPod::start(self, spec)
    }

    /// The node's network namespace: the "host network".
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.0.netns
    }

    /// The namespace beside it that holds the metadata service's addresses.
    #[must_use]
    pub fn imds_netns(&self) -> &Netns {
        &self.0.imds
    }

    /// The pods' cgroup, `…/kubepods.slice`: what `--cgroup` names.
    #[must_use]
    pub fn kubepods(&self) -> &Path {
        self.0.kubepods.path()
    }

    /// The cgroup above [`Self::kubepods`], where the host's own services are.
    #[must_use]
    pub fn root_cgroup(&self) -> &Path {
        self.0.root.path()
    }

    /// A mounted, empty bpffs. Unmounting it at the end frees what is pinned.
    #[must_use]
    pub fn bpffs(&self) -> PathBuf {
        self.0.bpffs.clone()
    }

    /// A folder for files of the node, such as the agent's state.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.0.folder.0
    }

    /// A command on the host: in the node's network namespace, outside the pods' cgroup.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = self.0.netns.command(program);
        self.0.agent.adopt(&mut command)?;
        Ok(command)
    }

    /// Detaches the link that is pinned at `pin`, as `bpftool link detach` does. The pin stays. Kernel 5.9.
    pub fn detach_link(&self, pin: &Path) -> Result<()> {
        detach_link(pin).with_context(|| format!("detaching the link at {}", pin.display()))
    }

    /// The number of the next pod, which its addresses and its interface are made of.
    pub(super) fn next_pod(&self) -> u16 {
        self.0.next_pod.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether `address` is the node's own.
    #[must_use]
    pub fn has_address(address: IpAddr) -> bool {
        address == NODE_V4 || address == NODE_V6
    }
}

// === impl Folder ===

impl Folder {
    fn create(name: &str) -> Result<Self> {
        let path = sweep::folder(name);
        let bpffs = path.join("bpf");
        fs::create_dir_all(&bpffs).with_context(|| format!("making {}", bpffs.display()))?;
        let folder = Self(path);
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None)
            .with_context(|| format!("mounting a bpffs at {}", bpffs.display()))?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = sweep::remove_folder(&self.0) {
            eprintln!("lab: {} can't be removed: {error:#}", self.0.display());
        }
    }
}

/// Links the two namespaces so that whatever leaves the node for an IMDS address does arrive, and is answered.
fn connect(node: &Netns, imds: &Netns) -> Result<()> {
    node.sysctl("ipv4/ip_forward", "1")?;
    node.ip(&format!("link add eth0 type veth peer name eth0 netns {}", imds.path()))?;
    imds.ip(&format!(
        "link set eth0 up\n\
         addr add 10.77.255.254/32 dev eth0\n\
         addr add {IMDS_V4}/32 dev eth0\n\
         route add {NODE_V4} dev eth0\n\
         route add default via {NODE_V4}\n"
    ))?;
    node.ip(&format!(
        "link set eth0 up\n\
         addr add {NODE_V4}/32 dev eth0\n\
         route add {IMDS_V4} dev eth0 src {NODE_V4}\n\
         route add 10.77.255.254 dev eth0\n\
         route add default via 10.77.255.254\n"
    ))?;
    if has_ipv6() { connect_v6(node, imds) } else { Ok(()) }
}

fn connect_v6(node: &Netns, imds: &Netns) -> Result<()> {
    node.sysctl("ipv6/conf/all/forwarding", "1")?;
    imds.ip(&format!(
        "addr add {IMDS_V6}/128 dev eth0 nodad\n\
         addr add fd77::ffff:fe/128 dev eth0 nodad\n\
         route add {NODE_V6} dev eth0\n\
         route add ::/0 via {NODE_V6} dev eth0\n"
    ))?;
    node.ip(&format!(
        "addr add {NODE_V6}/128 dev eth0 nodad\n\
         route add {IMDS_V6} dev eth0 src {NODE_V6}\n\
         route add fd77::ffff:fe dev eth0\n\
         route add ::/0 via fd77::ffff:fe dev eth0\n"
    ))
}

/// `BPF_OBJ_GET` and `BPF_LINK_DETACH`, which needs no map or program of ours.
fn detach_link(pin: &Path) -> io::Result<()> {
    const OBJ_GET: i64 = 7;
    const LINK_DETACH: i64 = 34;
    /// The part of `union bpf_attr` that both read: a pointer or a descriptor first.
    type Attr = [u64; 2];
    let bpf = |command: i64, attr: &Attr| {
        // SAFETY: the kernel reads as much of the attributes as is said, and the path that they point to, which lives.
        let answer =
            unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of::<Attr>()) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
    };
    let path = CString::new(pin.as_os_str().as_encoded_bytes())?;
    let link = bpf(OBJ_GET, &[path.as_ptr() as u64, 0])? as RawFd;
    // SAFETY: the call has just returned it, and nobody else has it.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    let attr = [u64::from(link.as_raw_fd().cast_unsigned()), 0];
    // The descriptor is the first four bytes, on the little-endian machines that there are.
    bpf(LINK_DETACH, &attr).map(drop)
}

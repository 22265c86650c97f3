//! Loading, attaching and replacing the programs.

use std::{
    fmt, fs,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray, SkStorage},
    programs::SocketFilter,
};
use aya_log::EbpfLogger;
use kiam_common::{
    HOST_NETNS_INITIAL, PATH_AUTO, PATH_NODE, PATH_POD_LOCAL,
    redirect::{AgentPorts, Target},
};
use tracing::info;

use super::{
    Cgroup, Config, Error, Flows, HostNetworkPods, Lease, Marks, Mode, Observed, Path as Way,
    Rewriter, SandboxTable, UplinkProgram, Verdicts, ancestors,
    attach::{attach, load, pin_error, replace_or, verify},
    guard,
    hold::Hold,
    in_use::Patience,
    netns,
    own_pod::{CLASSES_TIME, mark_cgroups},
    pins,
    refusal::program_error,
    walk::Walk,
};
use crate::blocking::Blocking;

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("KIAM_BPF_OBJECT"));

pub(super) const MAPS: [&str; 10] = [
    "LEASE",
    "SANDBOXES",
    "CGROUPS",
    "CLIENTS",
    "LISTENERS",
    "PASSED",
    "FLOWS",
    "PODS",
    "OBSERVED",
    "COUNTERS",
];

/// In the order they are attached: nobody takes the agent's ports, and identity comes before the redirect, so
/// that no redirected connection goes without a record.
const ENFORCING: [&str; 9] = [
    "kiam_bind4",
    "kiam_bind6",
    "kiam_sock_ops",
    "kiam_getpeername4",
    "kiam_getpeername6",
    "kiam_connect6",
    "kiam_connect4",
    "kiam_sendmsg4",
    "kiam_sendmsg6",
];

/// What sees connects and datagrams, and nothing that changes anything else. `kiam_sock_ops` has nothing to publish, but
/// takes back what was published before: a connection that nobody saw close would count for its pod for good.
const OBSERVING: [&str; 5] =
    ["kiam_sock_ops", "kiam_connect6", "kiam_connect4", "kiam_sendmsg4", "kiam_sendmsg6"];

pub(super) const GUARD: &str = "kiam_guard";

/// The programs, loaded; [`Interception::attach`] puts them to work.
#[derive(Debug)]
pub struct Interception {
    ebpf: Ebpf,
    pub(super) pins: PathBuf,
    older: Vec<PathBuf>,
    pub(super) cgroup: Cgroup,
    /// `--cgroup`.
    pub(super) given: Option<PathBuf>,
    pub(super) programs: Vec<&'static str>,
    /// The QoS classes' cgroups that are marked.
    pub(super) classes: Vec<u64>,
    pub(super) hold: Hold,
    pub(super) patience: Patience,
    uplink: bool,
    filters_syns: bool,
    host_netns: Option<u64>,
    log: bool,
}

/// What stays with the agent once the programs work.
#[derive(Debug)]
pub struct Parts {
    /// The agent's sign of life.
    pub lease: Lease,
    /// Who opened which connection.
    pub flows: Flows,
    /// The kernel's counts.
    pub verdicts: Verdicts,
    /// Where the programs are attached.
    pub cgroup: Cgroup,
    /// Cgroups that are treated otherwise.
    pub marks: Marks,
    /// The network namespaces that are known to be pods'.
    pub sandboxes: SandboxTable,
    /// The cookie of the node's own; `None` where the kernel doesn't tell namespaces apart (before 5.14).
    pub host_netns: Option<u64>,
    /// For the proof.
    pub rewriter: Rewriter,
    /// Whether packets of the pods' cgroup are guarded.
    pub guards_packets: bool,
    /// Who was only observed, where that is the mode.
    pub observed: Option<Observed>,
    /// Whether no agent enforced here before, so that nothing notes which older connections may go on.
    pub first: bool,
    /// What the guard attaches where packets leave the node, if it does.
    pub uplink: Option<UplinkProgram>,
    /// What the programs write to the log, if they do.
    pub log: Option<KernelLog>,
    /// The programs, to attach them again where that is needed.
    pub programs: Interception,
}

/// Passes on what the kernel programs log; nothing is seen until it is flushed.
pub struct KernelLog(EbpfLogger<&'static dyn log::Log>);

// === impl KernelLog ===

impl KernelLog {
    /// Writes what has come to the agent's log.
    pub fn flush(&mut self) {
        self.0.flush();
    }
}

impl fmt::Debug for KernelLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KernelLog")
    }
}

// === impl Interception ===

impl Interception {
    /// Loads the programs, with `target` as the agent's listeners, over the maps that are pinned or new ones.
    /// Nothing that is attached changes.
    ///
    /// # Errors
    ///
    /// Whatever is missing on this machine; see [`Error`].
    pub fn load(blocking: &Blocking, config: &Config, target: Target) -> Result<Self, Error> {
        let cgroup = Cgroup::open(blocking, config.cgroup.as_deref())?;
        let (pins, older) = pins::open(&config.bpffs)?;
        let host_netns = netns::host_netns().map_err(|source| Error::File {
            what: "the node's network namespace cookie (SO_NETNS_COOKIE)",
            path: PathBuf::from("/proc/self/ns/net"),
            source,
        })?;
        let passes = u32::from(config.host_network == HostNetworkPods::Pass);
        let observes = u32::from(config.mode == Mode::Observe);
        let path = match config.path {
            Way::Auto => PATH_AUTO,
            Way::PodLocal => PATH_POD_LOCAL,
            Way::Node => PATH_NODE,
        };
        let [admin, metrics] = config.operator_ports;
        let ports: AgentPorts = [target.v4_port, target.v6_port, admin, metrics];
        let known = host_netns != HOST_NETNS_INITIAL;
        let only_known = u32::from(config.has_filter() && known);
        let level: u8 = if config.log { 4 } else { 0 };
        let mut loader = loader(&pins);
        loader
            .override_global("TARGET", &target, true)
            .override_global("AGENT_PORTS", &ports, true)
            .override_global("HOST_NETNS", &host_netns, true)
            .override_global("HOST_NETWORK_PASSES", &passes, true)
            .override_global("NAMESPACES_ARE_KNOWN", &only_known, true)
            .override_global("OBSERVES", &observes, true)
            .override_global("PATH", &path, true)
            .override_global(aya_log::LEVEL, &level, false);
        let mut ebpf = loader.load(OBJECT)?;
        let programs = programs(config, &cgroup)?;
        verify(&mut ebpf, &programs)?;
        Ok(Self {
            ebpf,
            pins,
            older,
            cgroup,
            given: config.cgroup.clone(),
            programs,
            classes: Vec::new(),
            hold: Hold::default(),
            patience: Patience::default(),
            uplink: config.guard.uplink && config.mode == Mode::Enforce,
            filters_syns: config.has_filter(),
            host_netns: known.then_some(host_netns),
            log: config.log,
        })
    }

    /// Attaches the programs, or replaces those of an earlier agent in place, and pins them. `listeners` are
    /// the sockets that the targets name.
    ///
    /// # Errors
    ///
    /// The kernel's; what is attached already stays so, and a later attempt completes it.
    pub fn attach(
        mut self,
        blocking: &Blocking,
        listeners: &[BorrowedFd<'_>],
    ) -> Result<Parts, Error> {
        // One that only observes does not attach it.
        let first = !pins::link(&self.pins, "kiam_getpeername4").exists() && self.older.is_empty();
        self.mark(listeners)?;
        self.attach_all(blocking)?;
        self.hold.maps(&self.pins)?;
        let ebpf = &mut self.ebpf;
        let log = if self.log { Some(KernelLog(EbpfLogger::init(ebpf)?)) } else { None };
        let lease = Lease::new(array(ebpf, "LEASE")?);
        let flows = Flows::new(hash(ebpf, "FLOWS")?, hash(ebpf, "PODS")?);
        let map = ebpf.take_map("COUNTERS").ok_or(Error::Missing("COUNTERS"))?;
        let counters = PerCpuArray::try_from(map).map_err(map_error("COUNTERS"))?;
        let rewriter = Rewriter::load(ebpf)?;
        let observed = (!self.enforces()).then(|| Observed::open(&self.pins)).transpose()?;
        let uplink = match self.uplink {
            true => {
                let agent = self.hold.program(guard::AGENT).unwrap_or_default();
                let ebpf = loader(&self.pins).load(OBJECT)?;
                Some(UplinkProgram::load(ebpf, self.pins.clone(), agent)?)
            }
            false => None,
        };
        Ok(Parts {
            lease,
            flows,
            verdicts: Verdicts::new(counters),
            cgroup: self.cgroup.clone(),
            marks: Marks::open(&self.pins)?,
            sandboxes: SandboxTable::open(&self.pins)?,
            host_netns: self.host_netns,
            rewriter,
            guards_packets: self.guards_packets(),
            observed,
            first,
            uplink,
            log,
            programs: self,
        })
    }

    /// Attaches every program to the pods' cgroup, over what an earlier agent left there.
    pub(super) fn attach_all(&mut self, blocking: &Blocking) -> Result<(), Error> {
        self.mark_cgroups(blocking)?;
        pins::adopt(&self.pins, &self.older, &self.programs)?;
        for name in self.programs.clone() {
            self.attach_one(name)?;
        }
        self.detach_others()?;
        pins::tidy(&self.pins, &self.older)
    }

    /// Tells the programs which cgroups hold pods, and which is the agent's own pod.
    pub(super) fn mark_cgroups(&mut self, blocking: &Blocking) -> Result<(), Error> {
        let classes = self.cgroup.qos_classes(&mut Walk::new(blocking, CLASSES_TIME));
        let map = self.ebpf.map_mut("CGROUPS").ok_or(Error::Missing("CGROUPS"))?;
        // Borrowed: the programs that are still to be loaded need the map's descriptor.
        let map = HashMap::try_from(map).map_err(map_error("CGROUPS"))?;
        mark_cgroups(map, &self.cgroup, &classes)?;
        self.classes = classes;
        Ok(())
    }

    /// Marks the agent's listeners, so that connect knows them, and puts the filter of SYNs before them.
    fn mark(&mut self, listeners: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let map = self.ebpf.map_mut("LISTENERS").ok_or(Error::Missing("LISTENERS"))?;
        let mut marks: SkStorage<&mut MapData, u32> =
            SkStorage::try_from(map).map_err(map_error("LISTENERS"))?;
        for socket in listeners {
            marks.insert(socket, 1, 0).map_err(map_error("LISTENERS"))?;
        }
        if !self.filters_syns {
            return Ok(());
        }
        let name = "kiam_listener";
        let failed = program_error(name);
        let program = self.ebpf.program_mut(name).ok_or(Error::Missing(name))?;
        let filter: &mut SocketFilter = program.try_into().map_err(failed)?;
        filter.load().map_err(failed)?;
        for socket in listeners {
            filter.attach(socket).map_err(failed)?;
        }
        Ok(())
    }

    /// Whether packets of the pods' cgroup are guarded.
    pub(super) fn guards_packets(&self) -> bool {
        self.programs.contains(&GUARD)
    }

    /// Whether it does more than observe.
    pub(super) fn enforces(&self) -> bool {
        self.programs != OBSERVING
    }

    pub(super) fn attach_one(&mut self, name: &'static str) -> Result<(), Error> {
        let pin = pins::link(&self.pins, name);
        let failed = program_error(name);
        let program = self.ebpf.program_mut(name).ok_or(Error::Missing(name))?;
        let fd =
            load(program).map_err(failed)?.try_clone().map_err(|source| pin_error(&pin, source))?;
        let id = program.info().map_err(failed)?.id();
        let directory = self.cgroup.directory();
        replace_or(&pin, &self.cgroup, fd.as_fd(), || attach(program, directory), name)?;
        self.hold.link(name, id, &pin)
    }

    /// Ends what an earlier agent, with other flags, had attached besides.
    fn detach_others(&self) -> Result<(), Error> {
        for name in ENFORCING.into_iter().chain([GUARD]) {
            let pin = pins::link(&self.pins, name);
            if !self.programs.contains(&name) && pin.exists() {
                fs::remove_file(&pin).map_err(|source| pin_error(&pin, source))?;
            }
        }
        if !self.uplink {
            guard::remove_uplinks(&self.pins)?;
        }
        Ok(())
    }
}

/// Loads the object over the maps that are pinned in `pins`, or new ones.
fn loader(pins: &Path) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    for map in MAPS {
        loader.map_pin_path(map, pins.join(map));
    }
    loader
}

/// The programs that `config` asks for, in the order they are attached.
fn programs(config: &Config, cgroup: &Cgroup) -> Result<Vec<&'static str>, Error> {
    if config.mode == Mode::Observe {
        return Ok(OBSERVING.to_vec());
    }
    let mut programs = ENFORCING.to_vec();
    let above = ancestors::with_programs(cgroup)?;
    for path in &above {
        // They run after ours and may rewrite any address to the IMDS's: socket load balancers do such things.
        info!(cgroup = %path.display(), "Programs above the pods' cgroup: packets are guarded too");
    }
    if config.guard.skb || !above.is_empty() {
        programs.push(GUARD);
    }
    Ok(programs)
}

pub(super) fn map_error(name: &'static str) -> impl Fn(aya::maps::MapError) -> Error {
    move |source| Error::Map { name, source }
}

fn array(ebpf: &mut Ebpf, name: &'static str) -> Result<Array<MapData, u64>, Error> {
    let map = ebpf.take_map(name).ok_or(Error::Missing(name))?;
    Array::try_from(map).map_err(map_error(name))
}

fn hash<K: aya::Pod, V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, Error> {
    let map = ebpf.take_map(name).ok_or(Error::Missing(name))?;
    HashMap::try_from(map).map_err(map_error(name))
}

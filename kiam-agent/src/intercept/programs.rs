//! Loading, attaching and replacing the programs.

use std::{
    fmt, fs, io,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError, SockOps,
        links::{FdLink, LinkError},
    },
};
use aya_log::EbpfLogger;
use kiam_common::redirect::Target;

use super::{
    Cgroup, Config, Error, Flows, HostNetworkPods, Lease, Verdicts, links::PinnedLink, netns,
    own_pod::exempt_own_pod, pins,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("KIAM_BPF_OBJECT"));

const MAPS: [&str; 6] = ["LEASE", "CGROUPS", "CLIENTS", "FLOWS", "NETNS", "COUNTERS"];

/// In the order they are attached: identity before the redirect, so that no redirected connection
/// goes without a record.
const PROGRAMS: [&str; 7] = [
    "kiam_sock_ops",
    "kiam_getpeername4",
    "kiam_getpeername6",
    "kiam_connect6",
    "kiam_connect4",
    "kiam_sendmsg4",
    "kiam_sendmsg6",
];

/// The programs, loaded; [`Interception::attach`] puts them to work.
#[derive(Debug)]
pub struct Interception {
    ebpf: Ebpf,
    pins: PathBuf,
    older: Vec<PathBuf>,
    pub(super) cgroup: Cgroup,
    /// `--cgroup`.
    pub(super) given: Option<PathBuf>,
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
    pub fn load(config: &Config, target: Target) -> Result<Self, Error> {
        let cgroup = Cgroup::open(config.cgroup.as_deref())?;
        let (pins, older) = pins::open(&config.bpffs)?;
        let host_netns = match config.host_network {
            HostNetworkPods::Intercept => 0,
            HostNetworkPods::Pass => netns::host_netns().map_err(|source| Error::File {
                what: "the node's network namespace cookie (SO_NETNS_COOKIE)",
                path: PathBuf::from("/proc/self/ns/net"),
                source,
            })?,
        };
        let level: u8 = if config.log { 4 } else { 0 };
        let mut loader = EbpfLoader::new();
        loader
            .override_global("TARGET", &target, true)
            .override_global("HOST_NETNS", &host_netns, true)
            .override_global(aya_log::LEVEL, &level, false);
        for map in MAPS {
            loader.map_pin_path(map, pins.join(map));
        }
        let mut ebpf = loader.load(OBJECT)?;
        verify(&mut ebpf)?;
        Ok(Self { ebpf, pins, older, cgroup, given: config.cgroup.clone(), log: config.log })
    }

    /// Attaches the programs, or replaces those of an earlier agent in place, and pins them.
    ///
    /// # Errors
    ///
    /// The kernel's; what is attached already stays so, and a later attempt completes it.
    pub fn attach(mut self) -> Result<Parts, Error> {
        self.attach_all()?;
        let ebpf = &mut self.ebpf;
        let log = if self.log { Some(KernelLog(EbpfLogger::init(ebpf)?)) } else { None };
        let lease = Lease::new(array(ebpf, "LEASE")?);
        let flows = Flows::new(hash(ebpf, "FLOWS")?, hash(ebpf, "NETNS")?);
        let map = ebpf.take_map("COUNTERS").ok_or(Error::Missing("COUNTERS"))?;
        let counters = PerCpuArray::try_from(map).map_err(map_error("COUNTERS"))?;
        let cgroup = self.cgroup.clone();
        Ok(Parts { lease, flows, verdicts: Verdicts::new(counters), cgroup, log, programs: self })
    }

    /// Attaches every program to the pods' cgroup, over what an earlier agent left there.
    pub(super) fn attach_all(&mut self) -> Result<(), Error> {
        let map = self.ebpf.map_mut("CGROUPS").ok_or(Error::Missing("CGROUPS"))?;
        // Borrowed: the programs that are still to be loaded need the map's descriptor.
        exempt_own_pod(HashMap::try_from(map).map_err(map_error("CGROUPS"))?, &self.cgroup)?;
        pins::adopt(&self.pins, &self.older, &PROGRAMS)?;
        for name in PROGRAMS {
            self.attach_one(name)?;
        }
        pins::tidy(&self.pins, &self.older)
    }

    fn attach_one(&mut self, name: &'static str) -> Result<(), Error> {
        let pin = self.pins.join(format!("link_{name}"));
        let failed = |source| Error::Program { name, source };
        let program = self.ebpf.program_mut(name).ok_or(Error::Missing(name))?;
        if name == "kiam_sock_ops" {
            let program: &mut SockOps = program.try_into().map_err(failed)?;
            // Loaded already when it is attached again.
            if program.fd().is_err() {
                program.load().map_err(failed)?;
            }
            let fd =
                program.fd().map_err(failed)?.try_clone().map_err(|source| io(&pin, source))?;
            return replace_or(
                &pin,
                &self.cgroup,
                fd.as_fd(),
                || {
                    let id = program.attach(self.cgroup.directory(), CgroupAttachMode::Single)?;
                    Ok(program.take_link(id)?.try_into()?)
                },
                name,
            );
        }
        let program: &mut CgroupSockAddr = program.try_into().map_err(failed)?;
        if program.fd().is_err() {
            program.load().map_err(failed)?;
        }
        let fd = program.fd().map_err(failed)?.try_clone().map_err(|source| io(&pin, source))?;
        replace_or(
            &pin,
            &self.cgroup,
            fd.as_fd(),
            || {
                let id = program.attach(self.cgroup.directory(), CgroupAttachMode::Single)?;
                Ok(program.take_link(id)?.try_into()?)
            },
            name,
        )
    }
}

/// Gives the kernel all programs before the first is attached: the verifier takes long, and while only some are
/// replaced, those of two agents work together.
fn verify(ebpf: &mut Ebpf) -> Result<(), Error> {
    for name in PROGRAMS {
        let program = ebpf.program_mut(name).ok_or(Error::Missing(name))?;
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load(),
            Program::SockOps(program) => program.load(),
            // Loaded when it is attached.
            _ => Ok(()),
        };
        loaded.map_err(|source| Error::Program { name, source })?;
    }
    Ok(())
}

/// A failed attach, before it has a name.
enum AttachError {
    Program(ProgramError),
    Link(LinkError),
}

impl From<ProgramError> for AttachError {
    fn from(error: ProgramError) -> Self {
        Self::Program(error)
    }
}

impl From<LinkError> for AttachError {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

/// Replaces the pinned link's program; where there is no link, or it is of another or a removed cgroup,
/// attaches anew and pins that in the old one's place, which ends only then.
fn replace_or(
    pin: &Path,
    cgroup: &Cgroup,
    program: BorrowedFd<'_>,
    attach: impl FnOnce() -> Result<FdLink, AttachError>,
    name: &'static str,
) -> Result<(), Error> {
    if let Some(link) = PinnedLink::open(pin)?
        && link.cgroup(pin)? == cgroup.id()
    {
        return link.update(program, pin);
    }
    let link = attach().map_err(|error| match error {
        AttachError::Program(source) => Error::Program { name, source },
        AttachError::Link(error) => Error::Program { name, source: io::Error::other(error).into() },
    })?;
    // bpffs takes no dots in names.
    let mut fresh = pin.as_os_str().to_owned();
    fresh.push(pins::DRAFT);
    let fresh = PathBuf::from(fresh);
    // A start that was cut short may have left one.
    let _ = fs::remove_file(&fresh);
    link.pin(&fresh).map_err(|source| Error::Pin { path: fresh.clone(), source })?;
    fs::rename(&fresh, pin).map_err(|source| io(pin, source))
}

fn io(path: &Path, source: io::Error) -> Error {
    Error::File { what: "pin", path: path.to_owned(), source }
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

//! Attaches and replaces the programs.

use std::{
    fmt, fs,
    os::fd::{AsFd as _, BorrowedFd},
    path::PathBuf,
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray, SkStorage},
};
use aya_log::EbpfLogger;
use kiam_common::names::{map, program};
use tokio::sync::watch;
use tracing::warn;

use super::{
    attach::attach, attach::load, attach::pin_error, attach::replace_or, attached,
    loading::ENFORCING, loading::OBSERVING, loading::listener_filter, open_pins::OpenPins,
    own_pod::CLASSES_TIME, own_pod::mark_cgroups,
};
use crate::{
    error::Error,
    guard::{self, UplinkProgram},
    intercept::{
        Flows, InterceptedSince, Lease, Marks, Observations, Rewriter, SandboxTable, Verdicts,
    },
    pins::{self, locks::Patience},
    sys::{Cgroup, Walk, rejection::program_error},
};
use kiam_core::blocking::Blocking;

/// The loaded programs. [`Interception::attach`] attaches them.
#[derive(Debug)]
pub struct Interception {
    pub(super) ebpf: Ebpf,
    pub(super) pins: PathBuf,
    pub(super) older: Vec<PathBuf>,
    pub(super) cgroup: Cgroup,
    /// `--cgroup`.
    pub(super) given: Option<PathBuf>,
    pub(super) programs: Vec<&'static str>,
    /// The marked cgroups of QoS classes.
    pub(super) classes: Vec<u64>,
    pub(super) open_pins: OpenPins,
    pub(super) patience: Patience,
    pub(super) guards_uplinks: bool,
    pub(super) uplink: Option<UplinkProgram>,
    pub(super) rewriter: Rewriter,
    pub(super) filters_syns: bool,
    pub(super) host_netns: Option<u64>,
    pub(super) log: bool,
    /// Where the boot guard notes since when its rules are there.
    pub(super) boot_notes: Option<PathBuf>,
    pub(super) intercepted: watch::Sender<Option<InterceptedSince>>,
}

/// The handles to the attached programs and their maps.
#[derive(Debug)]
pub struct InterceptionParts {
    /// The agent's lease.
    pub lease: Lease,
    /// The kernel's records of connections.
    pub flows: Flows,
    /// The kernel's counters.
    pub verdicts: Verdicts,
    /// The cgroup that the programs are attached to.
    pub cgroup: Cgroup,
    /// The marked cgroups.
    pub marks: Marks,
    /// The network namespaces that are known to be pods'.
    pub sandboxes: SandboxTable,
    /// The cookie of the node's namespace; `None` before kernel 5.14.
    pub host_netns: Option<u64>,
    /// Since when pods are intercepted without a gap; `None` where they are not.
    pub intercepted: watch::Receiver<Option<InterceptedSince>>,
    /// For the self-test.
    pub rewriter: Rewriter,
    /// Whether packets of the pods' cgroup are guarded.
    pub guards_packets: bool,
    /// The observed pods, in `--mode=observe`.
    pub observed: Option<Observations>,
    /// Whether no agent has enforced here before, so that there is no record of older connections that may go on.
    pub first: bool,
    /// The uplink guard's program, if it is on.
    pub uplink: Option<UplinkProgram>,
    /// The programs' log, if it is on.
    pub log: Option<KernelLog>,
    /// The programs, to reattach them when needed.
    pub programs: Interception,
}

/// The kernel programs' log, which is shown when it is flushed.
pub struct KernelLog(EbpfLogger<&'static dyn log::Log>);

// === impl KernelLog ===

impl KernelLog {
    /// Writes the new messages to the agent's log.
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
    /// Attaches and pins the programs, or replaces those of an earlier agent in place. `listeners` are the sockets of the
    /// targets.
    ///
    /// # Errors
    ///
    /// The kernel's. Programs that are attached already stay so, and a retry completes the rest.
    pub fn attach(
        mut self,
        blocking: &Blocking,
        listeners: &[BorrowedFd<'_>],
    ) -> Result<InterceptionParts, Error> {
        // An agent that only observes does not attach this program.
        let first =
            !pins::link(&self.pins, program::GETPEERNAME4).exists() && self.older.is_empty();
        self.mark(listeners)?;
        self.attach_all(blocking)?;
        self.open_pins.maps(&self.pins)?;
        let ebpf = &mut self.ebpf;
        let log = if self.log { Some(KernelLog(EbpfLogger::init(ebpf)?)) } else { None };
        let lease = Lease::new(array(ebpf, map::LEASE)?);
        let (flows, pods) = (hash(ebpf, map::FLOWS)?, hash(ebpf, map::PODS)?);
        let flows = Flows::new(flows, pods, hash(ebpf, map::PROCESSES)?);
        let map = ebpf.take_map(map::COUNTERS).ok_or(Error::Missing(map::COUNTERS))?;
        let counters = PerCpuArray::try_from(map).map_err(map_error(map::COUNTERS))?;
        let observed = (!self.enforces()).then(|| Observations::open(&self.pins)).transpose()?;
        Ok(InterceptionParts {
            lease,
            flows,
            verdicts: Verdicts::new(counters),
            cgroup: self.cgroup.clone(),
            marks: Marks::open(&self.pins)?,
            sandboxes: SandboxTable::open(&self.pins)?,
            host_netns: self.host_netns,
            intercepted: self.intercepted.subscribe(),
            rewriter: self.rewriter.clone(),
            guards_packets: self.guards_packets(),
            observed,
            first,
            uplink: self.uplink.take(),
            log,
            programs: self,
        })
    }

    /// Attaches every program to the pods' cgroup, and replaces an earlier agent's.
    pub(super) fn attach_all(&mut self, blocking: &Blocking) -> Result<(), Error> {
        self.mark_cgroups(blocking)?;
        pins::adopt(&self.pins, &self.older, &self.programs)?;
        self.carry_notes();
        for name in self.programs.clone() {
            self.attach_one(name)?;
        }
        self.detach_others()?;
        pins::tidy(&self.pins, &self.older)?;
        self.note_links();
        Ok(())
    }

    /// Records and publishes since when the links intercept. After a failure older pods are not reported, but all pods are
    /// intercepted.
    pub(super) fn note_links(&self) {
        // Removed in any case: it tells nothing of what happens later.
        let routing = self.boot_notes.as_deref().and_then(guard::take_note);
        let noted = match self.enforces() {
            true => attached::note(&self.pins, routing),
            false => Ok(None),
        };
        let since = noted.unwrap_or_else(|error| {
            warn!(%error, "Reading the links' attach times failed; pods that may hold the node's credentials are not reported");
            None
        });
        self.intercepted.send_replace(since);
    }

    /// Takes over what earlier agents noted of the links that are about to get these programs.
    fn carry_notes(&self) {
        let carried = match self.enforces() {
            true => attached::carry(&self.pins, &self.older),
            false => attached::forget(&self.pins),
        };
        if let Err(error) = carried {
            warn!(%error, "Copying attach times from an older pin layout failed");
        }
    }

    /// Marks the cgroups that hold pods, and the agent's own pod, for the programs.
    pub(super) fn mark_cgroups(&mut self, blocking: &Blocking) -> Result<(), Error> {
        let classes = self.cgroup.qos_classes(&mut Walk::new(blocking, CLASSES_TIME));
        let map = self.ebpf.map_mut(map::CGROUPS).ok_or(Error::Missing(map::CGROUPS))?;
        // Borrowed, since loading further programs needs the map's descriptor.
        let map = HashMap::try_from(map).map_err(map_error(map::CGROUPS))?;
        mark_cgroups(map, &self.cgroup, &classes)?;
        self.classes = classes;
        Ok(())
    }

    /// Marks the agent's listeners for the connect hooks, and attaches the filter of SYNs to them.
    fn mark(&mut self, listeners: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let map = self.ebpf.map_mut(map::LISTENERS).ok_or(Error::Missing(map::LISTENERS))?;
        let mut marks: SkStorage<&mut MapData, u32> =
            SkStorage::try_from(map).map_err(map_error(map::LISTENERS))?;
        for socket in listeners {
            marks.insert(socket, 1, 0).map_err(map_error(map::LISTENERS))?;
        }
        if !self.filters_syns {
            return Ok(());
        }
        let filter = listener_filter(&mut self.ebpf)?;
        for socket in listeners {
            filter.attach(socket).map_err(program_error(program::LISTENER))?;
        }
        Ok(())
    }

    /// Whether packets of the pods' cgroup are guarded.
    pub(super) fn guards_packets(&self) -> bool {
        self.programs.contains(&program::GUARD)
    }

    /// Whether the programs enforce.
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
        self.open_pins.link(name, id, &pin)
    }

    /// Detaches the programs of an earlier agent that this configuration does not use.
    fn detach_others(&self) -> Result<(), Error> {
        for name in ENFORCING.into_iter().chain([program::GUARD]) {
            let pin = pins::link(&self.pins, name);
            if !self.programs.contains(&name) && pin.exists() {
                fs::remove_file(&pin).map_err(|source| pin_error(&pin, source))?;
            }
        }
        if !self.guards_uplinks {
            guard::remove_uplinks(&self.pins)?;
        }
        Ok(())
    }
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

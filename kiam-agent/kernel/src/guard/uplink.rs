//! The uplink guard: a program where packets leave the node, for those of pods that do not pass its routing
//! (hostNetwork pods' packet sockets, CNIs that bypass it).
//!
//! From kernel 6.6 by a pinned tcx link a interface, before everybody else's; below, by a filter of clsact with a
//! number of its own. Both outlive the agent, and a later agent replaces the program in place.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    mem::ManuallyDrop,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
            qdisc_detach_program,
        },
    },
};

use super::{selection::Interface, selection::interfaces, selection::uplinks};
use crate::{
    error::Error,
    pins::{self, AttachLock, in_use::Patience},
    sys::{links::PinnedLink, refusal::program_error},
};

/// The program's name in the object, and the filter's.
const PROGRAM: &str = "kiam_uplink";
/// Pins are this and the interface's number.
const PIN: &str = "link_uplink_";
/// The program by which it is told which agent's programs work. Every agent attaches it.
pub(crate) const AGENT: &str = "kiam_connect4";
/// The first: a filter before it could end the search.
const PRIORITY: u16 = 1;
/// Ours, so that a later agent finds it.
const HANDLE: TcHandle = TcHandle::new(0, 107);

/// The program, loaded, and where it works.
#[derive(Debug)]
pub struct UplinkProgram {
    ebpf: Ebpf,
    pins: PathBuf,
    /// Whether the kernel has tcx links; known after the first interface.
    tcx: bool,
    /// By number, the interfaces at which this agent's program works. Their links are held open, so that removing a pin
    /// detaches nothing while the agent lives; a filter has none.
    attached: HashMap<u32, Option<PinnedLink>>,
    /// The id of this agent's program at [`AGENT`].
    agent: u32,
    patience: Patience,
}

// === impl UplinkProgram ===

impl UplinkProgram {
    /// The program of `ebpf`, an object of its own, for pins in `pins`. `agent` is the id of this agent's program at
    /// [`AGENT`].
    pub(crate) fn load(mut ebpf: Ebpf, pins: PathBuf, agent: u32) -> Result<Self, Error> {
        program(&mut ebpf)?.load().map_err(failed)?;
        let (attached, patience) = (HashMap::new(), Patience::default());
        Ok(Self { ebpf, pins, tcx: true, attached, agent, patience })
    }

    /// Attaches at those of the node's uplinks where it is not, and takes the pins of interfaces that are gone away. Where it
    /// once was it stays: a packet socket needs no route. Says where it is new. One that fails keeps none of the
    /// others from being tried.
    pub(super) fn keep(&mut self) -> Result<Vec<String>, Error> {
        self.forget_gone()?;
        let mut uplinks = uplinks().map_err(|source| self.unreadable(source))?;
        uplinks.retain(|uplink| !self.attached.contains_key(&uplink.index));
        self.attach_all(uplinks)
    }

    /// Attaches and pins again what somebody has detached or unpinned; says where. Nothing while another agent attaches
    /// its programs, for two seconds, or once one has: that may go without this part of the guard. Not the filters of kernels
    /// below 6.6.
    pub(super) fn restore(&mut self) -> Result<Vec<String>, Error> {
        let lost = self.lost()?;
        if lost.is_empty() {
            self.patience.renew();
            return Ok(Vec::new());
        }
        let bpffs = self.pins.parent().unwrap_or(&self.pins);
        let turn = AttachLock::take(bpffs)?;
        if !self.is_at_work()? || (turn.is_none() && !self.patience.is_over()) {
            return Ok(Vec::new());
        }
        let mut there = interfaces().map_err(|source| self.unreadable(source))?;
        there.retain(|interface| lost.contains(&interface.index));
        for interface in &there {
            // Held, it may want nothing but its pin. It is let go only once another has its place.
            let pin = self.pin(interface.index);
            if let Some(Some(link)) = self.attached.get(&interface.index)
                && link.interface(&pin)? == interface.index
                && !pin.exists()
            {
                link.pin(&pin)?;
            }
        }
        self.attach_all(there)
    }

    /// The interfaces at which it works no longer, or whose pins are gone.
    fn lost(&self) -> Result<Vec<u32>, Error> {
        let mut lost = Vec::new();
        for (&index, link) in &self.attached {
            let pin = self.pin(index);
            if let Some(link) = link
                && (link.interface(&pin)? != index || !pin.exists())
            {
                lost.push(index);
            }
        }
        Ok(lost)
    }

    /// Whether this agent's programs are those that work.
    fn is_at_work(&self) -> Result<bool, Error> {
        let pin = pins::link(&self.pins, AGENT);
        let link = PinnedLink::open(&pin)?;
        let program = link.map(|link| link.attached(&pin)).transpose()?;
        Ok(program.is_some_and(|(program, _)| program == self.agent))
    }

    /// At each of them. Says where, or of one that failed.
    fn attach_all(&mut self, interfaces: Vec<Interface>) -> Result<Vec<String>, Error> {
        let mut names = Vec::new();
        let mut failure = None;
        for Interface { name, index } in interfaces {
            match self.attach(&name, index) {
                Ok(link) => {
                    self.attached.insert(index, link);
                    names.push(name);
                }
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(names), Err)
    }

    fn pin(&self, index: u32) -> PathBuf {
        self.pins.join(format!("{PIN}{index}"))
    }

    /// At how many interfaces it is.
    pub(super) fn count(&self) -> usize {
        self.attached.len()
    }

    fn unreadable(&self, source: io::Error) -> Error {
        file("read the node's routes and interfaces, for the pins in", &self.pins, source)
    }

    fn forget_gone(&mut self) -> Result<(), Error> {
        let there = interfaces().map_err(|source| self.unreadable(source))?;
        let there: HashSet<u32> = there.iter().map(|interface| interface.index).collect();
        self.attached.retain(|index, _| there.contains(index));
        for (pin, index) in pinned(&self.pins)? {
            if !there.contains(&index) {
                fs::remove_file(&pin).map_err(|source| file("remove", &pin, source))?;
            }
        }
        Ok(())
    }

    fn attach(&mut self, name: &str, index: u32) -> Result<Option<PinnedLink>, Error> {
        if self.tcx {
            match self.attach_tcx(name, index) {
                // No such kind of link: a kernel below 6.6.
                Err(Error::Program { source: ProgramError::SyscallError(error), .. })
                    if error.io_error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
            self.tcx = false;
        }
        self.attach_filter(name).map(|()| None)
    }

    /// Replaces the pinned link's program; where there is none, or it is of an interface that had the number before,
    /// attaches anew and pins that.
    fn attach_tcx(&mut self, name: &str, index: u32) -> Result<Option<PinnedLink>, Error> {
        let pin = self.pin(index);
        let program = program(&mut self.ebpf)?;
        if let Some(link) = PinnedLink::open(&pin)? {
            if link.interface(&pin)? == index {
                let fd = program.fd().map_err(failed)?.try_clone();
                let fd = fd.map_err(|source| file("pin", &pin, source))?;
                link.update(fd.as_fd(), &pin)?;
                return Ok(Some(link));
            }
            fs::remove_file(&pin).map_err(|source| file("remove", &pin, source))?;
        }
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(name, TcAttachType::Egress, first);
        let link = id.and_then(|id| program.take_link(id)).map_err(failed)?;
        let link: FdLink =
            link.try_into().map_err(|error| failed(io::Error::other(error).into()))?;
        let pinned = link.pin(&pin).map(drop);
        pinned.map_err(|source| Error::Pin { path: pin.clone(), source })?;
        let gone = || file("open the pin", &pin, io::ErrorKind::NotFound.into());
        PinnedLink::open(&pin)?.ok_or_else(gone).map(Some)
    }

    /// Adds the filter, or replaces the program of the one that an earlier agent left.
    fn attach_filter(&mut self, name: &str) -> Result<(), Error> {
        let program = program(&mut self.ebpf)?;
        match qdisc_add_clsact(name) {
            // It is there, ours or somebody else's.
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            result => result.map_err(|error| failed(error.into()))?,
        }
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        let options = TcAttachOptions::Netlink(options);
        let id = match program.attach_with_options(name, TcAttachType::Egress, options) {
            Err(ProgramError::TcError(TcError::NetlinkError(error)))
                if error.raw_os_error() == Some(libc::EEXIST) =>
            {
                let at = TcAttachType::Egress;
                let old = SchedClassifierLink::attached(name, at, PRIORITY, HANDLE, None);
                old.map_err(|error| failed(error.into()))
                    .and_then(|old| program.attach_to_link(old).map_err(failed))?
            }
            result => result.map_err(failed)?,
        };
        // Dropped, it would be detached.
        let _stays = ManuallyDrop::new(program.take_link(id).map_err(failed)?);
        Ok(())
    }
}

/// Takes the pins in `pins` away, and the filters off every interface: an agent without this part of the guard has the
/// place of one that had it.
pub(crate) fn remove(pins: &Path) -> Result<(), Error> {
    for (pin, _) in pinned(pins)? {
        fs::remove_file(&pin).map_err(|source| file("remove", &pin, source))?;
    }
    remove_filters();
    Ok(())
}

/// Takes the filters of kernels without tcx off every interface of the node; says where from.
pub(super) fn remove_filters() -> Vec<String> {
    let mut removed = Vec::new();
    for Interface { name, .. } in interfaces().unwrap_or_default() {
        // Most interfaces have no clsact, and most of those that have, nothing of ours.
        if qdisc_detach_program(&name, TcAttachType::Egress, PROGRAM).is_ok() {
            removed.push(format!("{PROGRAM} from the egress of {name}"));
        }
    }
    removed
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, Error> {
    let program = ebpf.program_mut(PROGRAM).ok_or(Error::Missing(PROGRAM))?;
    program.try_into().map_err(failed)
}

/// The pins of links, with their interfaces' numbers.
fn pinned(pins: &Path) -> Result<Vec<(PathBuf, u32)>, Error> {
    let entries = match fs::read_dir(pins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(file("read", pins, source)),
    };
    let index = |path: &Path| path.file_name()?.to_str()?.strip_prefix(PIN)?.parse().ok();
    Ok(entries
        .flatten()
        .filter_map(|entry| index(&entry.path()).map(|index| (entry.path(), index)))
        .collect())
}

fn failed(source: ProgramError) -> Error {
    program_error(PROGRAM)(source)
}

fn file(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;

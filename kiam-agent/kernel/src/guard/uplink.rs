//! The uplink guard: a program where packets leave the node, for pods' packets that bypass the node's routing (packet
//! sockets of hostNetwork pods, and CNIs without it).
//!
//! From kernel 6.6 on the program is attached by one pinned tcx link per interface, before all other programs. Below, it
//! is a clsact filter with its own number. Both outlive the agent, and a later agent replaces the program in place.

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
use kiam_common::names::program;

use super::{selection::Interface, selection::interfaces, selection::uplinks};
use crate::{
    error::Error,
    pins::{self, AttachLock, locks::Patience},
    sys::{links::PinnedLink, rejection::program_error},
};

/// The program's name in the object, and the filter's.
const PROGRAM: &str = program::UPLINK;
/// The prefix of pins, before the interface's index.
const PIN: &str = "link_uplink_";
/// The program that shows which agent's programs are attached. Every agent attaches it.
const AGENT: &str = program::CONNECT4;
/// The highest priority: an earlier filter could end the search.
const PRIORITY: u16 = 1;
/// The agent's handle, by which a later agent finds the filter.
const HANDLE: TcHandle = TcHandle::new(0, 107);

/// The loaded program, and the interfaces that it is attached to.
#[derive(Debug)]
pub struct UplinkProgram {
    ebpf: Ebpf,
    pins: PathBuf,
    /// Whether the kernel has tcx links, as known after the first interface.
    tcx: bool,
    /// The interfaces with this agent's program, by index. Links are held open, so that removing a pin detaches nothing
    /// while the agent lives. A filter has no link.
    attached: HashMap<u32, Option<PinnedLink>>,
    /// The id of this agent's program at [`AGENT`].
    agent: u32,
    patience: Patience,
}

// === impl UplinkProgram ===

impl UplinkProgram {
    /// Loads the program of `ebpf`, an object of its own, for pins in `pins`. `agent` is the id of this agent's [`AGENT`]
    /// program.
    pub(crate) fn load(mut ebpf: Ebpf, pins: PathBuf, agent: u32) -> Result<Self, Error> {
        program(&mut ebpf)?.load().map_err(failed)?;
        let (attached, patience) = (HashMap::new(), Patience::default());
        Ok(Self { ebpf, pins, tcx: true, attached, agent, patience })
    }

    /// Attaches the program to new uplinks, and removes the pins of interfaces that are gone. Former uplinks keep the
    /// program, since a packet socket needs no route. Returns the new uplinks. A failure does not stop the others.
    pub(super) fn keep(&mut self) -> Result<Vec<String>, Error> {
        self.forget_gone()?;
        let mut uplinks = uplinks().map_err(|source| self.unreadable(source))?;
        uplinks.retain(|uplink| !self.attached.contains_key(&uplink.index));
        self.attach_all(uplinks)
    }

    /// Restores detached links and removed pins, and returns the interfaces. Does nothing while another agent attaches its
    /// programs, for two seconds at most, or once one has, since that agent may be without this part of the guard. Filters of
    /// kernels below 6.6 are not restored.
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
            // A link that is still attached only needs its pin. The open link is dropped once another replaces it.
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

    /// The interfaces whose link is detached or whose pin is gone.
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

    /// Whether this agent's programs are attached.
    fn is_at_work(&self) -> Result<bool, Error> {
        let pin = pins::link(&self.pins, AGENT);
        let link = PinnedLink::open(&pin)?;
        let program = link.map(|link| link.attached(&pin)).transpose()?;
        Ok(program.is_some_and(|(program, _)| program == self.agent))
    }

    /// Attaches the program to all of `interfaces`. Returns their names, or an error if one fails.
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

    /// The number of guarded interfaces.
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
                // A kernel below 6.6 has no such links.
                Err(Error::Program { source: ProgramError::SyscallError(error), .. })
                    if error.io_error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
            self.tcx = false;
        }
        self.attach_filter(name).map(|()| None)
    }

    /// Replaces the pinned link's program. Without a link, or with one of an earlier interface of this index, attaches and
    /// pins a new one.
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
            // clsact exists already.
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
        // Dropping the link would detach it.
        let _stays = ManuallyDrop::new(program.take_link(id).map_err(failed)?);
        Ok(())
    }
}

/// Removes the pins in `pins`, and the filters of every interface, for an agent without this part of the guard that
/// replaces one with it.
pub(crate) fn remove(pins: &Path) -> Result<(), Error> {
    for (pin, _) in pinned(pins)? {
        fs::remove_file(&pin).map_err(|source| file("remove", &pin, source))?;
    }
    remove_filters();
    Ok(())
}

/// Removes the filters of kernels without tcx from every interface of the node, and returns their names.
pub(super) fn remove_filters() -> Vec<String> {
    let mut removed = Vec::new();
    for Interface { name, .. } in interfaces().unwrap_or_default() {
        // Most interfaces have no clsact, or none of the agent's filters.
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

/// The pins of links, with their interfaces' indices.
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

//! The uplink guard: a program where packets leave the node, for those of pods that do not pass its routing
//! (hostNetwork pods' packet sockets, CNIs that bypass it).
//!
//! From kernel 6.6 by a pinned tcx link a interface, before everybody else's; below, by a filter of clsact with a
//! number of its own. Both outlive the agent, and a later agent replaces the program in place.

use std::{
    collections::HashSet,
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

use super::{
    super::{Error, links::PinnedLink},
    selection::{Interface, interfaces, uplinks},
};

/// The program's name in the object, and the filter's.
const PROGRAM: &str = "kiam_uplink";
/// Pins are this and the interface's number.
const PIN: &str = "link_uplink_";
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
    /// Numbers of the interfaces at which this agent's program works.
    attached: HashSet<u32>,
}

// === impl UplinkProgram ===

impl UplinkProgram {
    /// The program of `ebpf`, an object of its own, for pins in `pins`.
    pub(in super::super) fn load(mut ebpf: Ebpf, pins: PathBuf) -> Result<Self, Error> {
        program(&mut ebpf)?.load().map_err(failed)?;
        Ok(Self { ebpf, pins, tcx: true, attached: HashSet::new() })
    }

    /// Attaches at those of the node's uplinks where it is not, and takes the pins of interfaces that are gone away. Where it
    /// once was it stays: a packet socket needs no route. Says where it is new. One that fails keeps none of the
    /// others from being tried.
    pub(super) fn keep(&mut self) -> Result<Vec<String>, Error> {
        self.forget_gone()?;
        let mut uplinks = uplinks().map_err(|source| self.unreadable(source))?;
        uplinks.retain(|uplink| !self.attached.contains(&uplink.index));
        let mut new = Vec::new();
        let mut failure = None;
        for uplink in uplinks {
            match self.attach(&uplink) {
                Ok(()) => new.push(uplink),
                Err(error) => failure = Some(error),
            }
        }
        self.attached.extend(new.iter().map(|uplink| uplink.index));
        match failure {
            Some(error) => Err(error),
            None => Ok(new.into_iter().map(|uplink| uplink.name).collect()),
        }
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
        self.attached.retain(|index| there.contains(index));
        for (pin, index) in pinned(&self.pins)? {
            if !there.contains(&index) {
                fs::remove_file(&pin).map_err(|source| file("remove", &pin, source))?;
            }
        }
        Ok(())
    }

    fn attach(&mut self, uplink: &Interface) -> Result<(), Error> {
        if self.tcx {
            match self.attach_tcx(uplink) {
                // No such kind of link: a kernel below 6.6.
                Err(Error::Program { source: ProgramError::SyscallError(error), .. })
                    if error.io_error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return result,
            }
            self.tcx = false;
        }
        self.attach_filter(uplink)
    }

    /// Replaces the pinned link's program; where there is none, or it is of an interface that had the number before,
    /// attaches anew and pins that.
    fn attach_tcx(&mut self, uplink: &Interface) -> Result<(), Error> {
        let pin = self.pins.join(format!("{PIN}{}", uplink.index));
        let program = program(&mut self.ebpf)?;
        if let Some(link) = PinnedLink::open(&pin)? {
            if link.interface(&pin)? == uplink.index {
                let fd = program.fd().map_err(failed)?.try_clone();
                let fd = fd.map_err(|source| file("pin", &pin, source))?;
                return link.update(fd.as_fd(), &pin);
            }
            fs::remove_file(&pin).map_err(|source| file("remove", &pin, source))?;
        }
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(&uplink.name, TcAttachType::Egress, first);
        let link = id.and_then(|id| program.take_link(id)).map_err(failed)?;
        let link: FdLink =
            link.try_into().map_err(|error| failed(io::Error::other(error).into()))?;
        link.pin(&pin).map(drop).map_err(|source| Error::Pin { path: pin, source })
    }

    /// Adds the filter, or replaces the program of the one that an earlier agent left.
    fn attach_filter(&mut self, uplink: &Interface) -> Result<(), Error> {
        let program = program(&mut self.ebpf)?;
        match qdisc_add_clsact(&uplink.name) {
            // It is there, ours or somebody else's.
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            result => result.map_err(|error| failed(error.into()))?,
        }
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        let options = TcAttachOptions::Netlink(options);
        let id = match program.attach_with_options(&uplink.name, TcAttachType::Egress, options) {
            Err(ProgramError::TcError(TcError::NetlinkError(error)))
                if error.raw_os_error() == Some(libc::EEXIST) =>
            {
                let (name, at) = (&uplink.name, TcAttachType::Egress);
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
pub(in super::super) fn remove(pins: &Path) -> Result<(), Error> {
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
    Error::Program { name: PROGRAM, source }
}

fn file(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;

//! Loads, attaches and pins one program, or replaces an earlier agent's.

use std::{
    fs::{self, File},
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use aya::programs::{
    CgroupAttachMode, CgroupSkbAttachType, CgroupSockAddr, Program, ProgramError, ProgramFd,
    links::{FdLink, LinkError},
};

use crate::{
    error::Error,
    pins,
    sys::{Cgroup, links::PinnedLink, rejection::program_error},
};

/// Loads `program`, unless it is loaded already.
pub(super) fn load(program: &mut Program) -> Result<&ProgramFd, ProgramError> {
    // Loaded already when it is attached again.
    if program.fd().is_ok() {
        return program.fd();
    }
    match &mut *program {
        Program::SockOps(program) => program.load()?,
        Program::CgroupSkb(program) => program.load()?,
        program => <&mut CgroupSockAddr>::try_from(program)?.load()?,
    }
    program.fd()
}

/// Attaches `program` to the cgroup `directory`.
pub(super) fn attach(program: &mut Program, directory: &File) -> Result<FdLink, AttachError> {
    // Links have the mode Single, which coexists with other programs on every kernel.
    let mode = CgroupAttachMode::Single;
    Ok(match program {
        Program::SockOps(program) => {
            let id = program.attach(directory, mode)?;
            program.take_link(id)?.try_into()?
        }
        Program::CgroupSkb(program) => {
            let id = program.attach(directory, CgroupSkbAttachType::Egress, mode)?;
            program.take_link(id)?.try_into()?
        }
        program => {
            let program = <&mut CgroupSockAddr>::try_from(program)?;
            let id = program.attach(directory, mode)?;
            program.take_link(id)?.try_into()?
        }
    })
}

/// A failed attach, before the program's name is added.
pub(super) enum AttachError {
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

/// Replaces the pinned link's program. Without a link, or with one of another or a removed cgroup, attaches a new link and
/// pins it over the old one, which is detached only then.
pub(super) fn replace_or(
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
        AttachError::Program(source) => program_error(name)(source),
        AttachError::Link(error) => Error::Program { name, source: io::Error::other(error).into() },
    })?;
    // bpffs takes no dots in names.
    let mut fresh = pin.as_os_str().to_owned();
    fresh.push(pins::DRAFT);
    let fresh = PathBuf::from(fresh);
    // An interrupted start may have left one.
    let _ = fs::remove_file(&fresh);
    link.pin(&fresh).map_err(|source| Error::Pin { path: fresh.clone(), source })?;
    fs::rename(&fresh, pin).map_err(|source| pin_error(pin, source))
}

/// The error of a pin that can't be created, or of a descriptor that can't be copied.
pub(super) fn pin_error(path: &Path, source: io::Error) -> Error {
    Error::File { what: "pin", path: path.to_owned(), source }
}

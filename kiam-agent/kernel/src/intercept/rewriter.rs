//! A program that rewrites addresses after the agent's programs, for the self-test.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use aya::{
    Ebpf,
    programs::{CgroupSockAddr, ProgramFd},
};
use kiam_common::names::program;

use crate::{
    error::Error,
    sys::{Cgroup, links, rejection::program_error},
};

const NAME: &str = program::REWRITE;

/// The loaded program, which is attached only while a [`RewriterLink`] lives. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Rewriter(Arc<ProgramFd>);

/// The open link of the program. Dropping it detaches the program.
#[derive(Debug)]
pub(crate) struct RewriterLink(#[expect(dead_code, reason = "kept open")] OwnedFd);

// === impl Rewriter ===

impl Rewriter {
    pub(crate) fn load(ebpf: &mut Ebpf) -> Result<Self, Error> {
        let failed = program_error(NAME);
        let program = ebpf.program_mut(NAME).ok_or(Error::Missing(NAME))?;
        let program: &mut CgroupSockAddr = program.try_into().map_err(failed)?;
        program.load().map_err(failed)?;
        let fd = program.fd().map_err(failed)?.try_clone();
        fd.map(Arc::new).map(Self).map_err(|source| Error::File {
            what: "copy the descriptor of",
            path: NAME.into(),
            source,
        })
    }

    /// Attaches the program to `cgroup`, after the programs that are attached there already.
    pub(crate) fn attach(&self, cgroup: &Cgroup) -> Result<RewriterLink, Error> {
        let link = links::connect4(self.0.as_fd(), cgroup.directory());
        link.map(RewriterLink).map_err(|source| Error::Bpf {
            call: "BPF_LINK_CREATE",
            path: cgroup.path().to_owned(),
            source,
        })
    }
}

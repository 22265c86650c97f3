//! A program that rewrites addresses behind the agent's own, for the self-test.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use aya::{
    Ebpf,
    programs::{CgroupSockAddr, ProgramFd},
};

use crate::{
    error::Error,
    sys::{Cgroup, links, rejection::program_error},
};

const NAME: &str = "kiam_rewrite";

/// Loaded, and attached only while [`RewriterLink`] lives. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Rewriter(Arc<ProgramFd>);

/// Drop detaches it: nothing else holds the link.
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

    /// Attaches it to `cgroup`, where it runs after what is attached there already.
    pub(crate) fn attach(&self, cgroup: &Cgroup) -> Result<RewriterLink, Error> {
        let link = links::connect4(self.0.as_fd(), cgroup.directory());
        link.map(RewriterLink).map_err(|source| Error::Bpf {
            call: "BPF_LINK_CREATE",
            path: cgroup.path().to_owned(),
            source,
        })
    }
}

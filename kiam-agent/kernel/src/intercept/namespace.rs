//! The node's network namespace, on kernels that don't tell an agent the cookie of its own (before 5.14).
//!
//! Programs at `bind` may ask for it since 5.7. So one is attached for a moment, and the agent binds a socket.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddrV4},
};

use aya::{
    maps::Array,
    programs::{CgroupAttachMode, CgroupSockAddr},
};
use kiam_common::{
    HOST_NETNS_INITIAL,
    names::{constant, map, program},
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketType, bind, socket, sockopt::socket_cookie},
};
use tracing::{info, warn};

use super::{
    ancestors::above,
    loader,
    loading::{OBJECT, rejected},
    programs::map_error,
};
use crate::{
    error::Error,
    sys::{Cgroup, rejection::program_error},
};

const NAME: &str = program::NAMESPACE;
/// What a failure names.
const NETNS: &str = "/proc/self/ns/net";
const NOTED: &str = map::PROBE_NETNS;

/// What `HOST_NETNS` is to be where the kernel does not tell.
///
/// Where it can't be learned, the node's is taken to be the initial namespace. Where that is wrong (a node that is itself a
/// container) no pod passes: nobody is let through by mistake.
pub(super) fn learned(object: &[u8], cgroup: &Cgroup) -> u64 {
    match learn(object, cgroup) {
        Ok(cookie) => {
            info!(cookie, "Learned the node's network namespace by a program at bind(2)");
            cookie
        }
        Err(error) => {
            warn!(
                %error,
                "The machine's first network namespace counts as the node's: on a node that is itself a container, such as kind's, hostNetwork pods are intercepted whatever --host-network-pods says"
            );
            HOST_NETNS_INITIAL
        }
    }
}

/// The cookie of this thread's network namespace, on any kernel. `cgroup` is one of the mount that the agent's own is on.
///
/// # Errors
///
/// The kernel's, and when the agent is in no cgroup of that mount.
pub fn own_namespace(cgroup: &Cgroup) -> Result<u64, Error> {
    learn(OBJECT, cgroup)
}

fn learn(object: &[u8], cgroup: &Cgroup) -> Result<u64, Error> {
    let socket =
        socket(AddressFamily::INET, SocketType::DGRAM, None).map_err(failed("socket(2)"))?;
    let probe = socket_cookie(&socket).map_err(failed("SO_COOKIE"))?;
    let mut loader = loader::new();
    loader.override_global(constant::PROBE_SOCKET, &probe, true);
    // Nothing of it is pinned.
    let mut ebpf = loader.load(object).map_err(rejected)?;
    let rejection = program_error(NAME);
    let program = ebpf.program_mut(NAME).ok_or(Error::Missing(NAME))?;
    let program: &mut CgroupSockAddr = program.try_into().map_err(rejection)?;
    program.load().map_err(rejection)?;
    // Whatever the agent's cgroup is, it is below the root.
    let root = above(cgroup)?.pop().unwrap_or_else(|| cgroup.path().to_owned());
    let directory = File::open(&root).map_err(|source| Error::File {
        what: "open",
        path: root.clone(),
        source,
    })?;
    let link = program.attach(&directory, CgroupAttachMode::Single).map_err(rejection)?;
    let bound =
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).map_err(failed("bind(2)"));
    program.detach(link).map_err(rejection)?;
    bound?;
    let map = ebpf.map(NOTED).ok_or(Error::Missing(NOTED))?;
    let noted: Array<_, u64> = Array::try_from(map).map_err(map_error(NOTED))?;
    match noted.get(&0, 0).map_err(map_error(NOTED))? {
        0 => Err(Error::OtherMount { path: root }),
        cookie => Ok(cookie),
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |error| Error::File { what, path: NETNS.into(), source: error.into() }
}

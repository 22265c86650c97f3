//! Other programs above the pods' cgroup, which run after the agent's.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use crate::{
    error::Error,
    sys::{Cgroup, links::bpf},
};

const BPF_PROG_QUERY: libc::c_int = 16;
/// `enum bpf_attach_type`: connect4, connect6, sendmsg4 and sendmsg6, which can rewrite a destination.
const REWRITING: [u32; 4] = [10, 11, 14, 15];

/// `union bpf_attr`, the part for `BPF_PROG_QUERY`: without room for ids, the kernel returns their number.
#[repr(C)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_cnt: u32,
    pad: u32,
}

/// The cgroups above `cgroup`, up to the mount's root, that have programs which can rewrite a destination.
pub(super) fn with_programs(cgroup: &Cgroup) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for path in above(cgroup)? {
        let directory = File::open(&path).map_err(|error| file(&path, error))?;
        let mut any = false;
        for attach_type in REWRITING {
            any |= count(&directory, attach_type).map_err(|source| Error::Bpf {
                call: "BPF_PROG_QUERY",
                path: path.clone(),
                source,
            })? > 0;
        }
        if any {
            found.push(path);
        }
    }
    Ok(found)
}

/// The cgroups above `cgroup`, up to the mount's root.
pub(super) fn above(cgroup: &Cgroup) -> Result<Vec<PathBuf>, Error> {
    let device = |path: &Path| rustix::fs::stat(path).map(|stat| stat.st_dev);
    let own = device(cgroup.path()).map_err(|error| file(cgroup.path(), error.into()))?;
    // Above the mount's root is another file system.
    let same = |path: &&Path| device(path).ok() == Some(own);
    Ok(cgroup.path().ancestors().skip(1).take_while(same).map(Path::to_owned).collect())
}

fn count(directory: &File, attach_type: u32) -> io::Result<u32> {
    let mut query = Query {
        target_fd: directory.as_raw_fd().unsigned_abs(),
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: 0,
        prog_cnt: 0,
        pad: 0,
    };
    match bpf(BPF_PROG_QUERY, &mut query) {
        Ok(_) => Ok(query.prog_cnt),
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(query.prog_cnt.max(1)),
        Err(error) => Err(error),
    }
}

fn file(path: &Path, source: io::Error) -> Error {
    Error::File { what: "look for programs at", path: path.to_owned(), source }
}

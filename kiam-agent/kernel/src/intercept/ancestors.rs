//! Other programs above the pods' cgroup, which run after the agent's.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use crate::{
    error::Error,
    sys::{Cgroup, hooks::Hook},
};

/// The cgroups above `cgroup`, up to the mount's root, that have programs which can rewrite a destination.
pub(super) fn with_programs(cgroup: &Cgroup) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for path in above(cgroup)? {
        let directory = File::open(&path).map_err(|error| file(&path, error))?;
        let mut any = false;
        for hook in Hook::OF_CGROUPS.into_iter().filter(|hook| hook.rewrites) {
            let attached = hook.attached(&directory).map_err(|source| Error::Bpf {
                call: "BPF_PROG_QUERY",
                path: path.clone(),
                source,
            })?;
            any |= !attached.ids.is_empty();
        }
        if any {
            found.push(path);
        }
    }
    Ok(found)
}

/// The cgroups above `cgroup`, up to the mount's root.
pub(crate) fn above(cgroup: &Cgroup) -> Result<Vec<PathBuf>, Error> {
    let device = |path: &Path| rustix::fs::stat(path).map(|stat| stat.st_dev);
    let own = device(cgroup.path()).map_err(|error| file(cgroup.path(), error.into()))?;
    // Above the mount's root is another file system.
    let same = |path: &&Path| device(path).ok() == Some(own);
    Ok(cgroup.path().ancestors().skip(1).take_while(same).map(Path::to_owned).collect())
}

fn file(path: &Path, source: io::Error) -> Error {
    Error::File { what: "look for programs at", path: path.to_owned(), source }
}

//! Cgroup ids to paths, without walking: a cgroup's id is its file handle.

use std::{
    collections::HashMap,
    ffi::c_int,
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::pods::{PodUid, Unattested};

/// `FILEID_KERNFS` of `linux/exportfs.h`: the handle is the 64-bit id. Kernel 5.5.
const FILEID_KERNFS: c_int = 0xfe;

/// Ids are not used again within a boot, so what was found holds; the cache is emptied when it is full.
const CACHED: usize = 4096;

/// Finds the pod that a cgroup belongs to.
#[derive(Debug)]
pub struct CgroupPaths {
    root: PathBuf,
    directory: File,
    known: Mutex<HashMap<u64, PodUid>>,
}

/// `struct file_handle` with the kernfs id as its handle.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: c_int,
    id: [u8; 8],
}

// === impl CgroupPaths ===

impl CgroupPaths {
    /// For cgroups below `root`, the pods' cgroup.
    ///
    /// # Errors
    ///
    /// The system's, when `root` can't be opened.
    pub fn new(root: &Path) -> io::Result<Self> {
        Ok(Self { root: root.to_owned(), directory: File::open(root)?, known: Mutex::default() })
    }

    /// The pod whose cgroup `id` is, or is below.
    ///
    /// # Errors
    ///
    /// [`Unattested::Gone`] when the cgroup was removed, [`Unattested::NotAPod`] when it is below no pod.
    pub fn pod(&self, id: u64) -> Result<PodUid, Unattested> {
        if let Some(uid) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&id) {
            return Ok(uid.clone());
        }
        let path = self.path(id).map_err(|error| match error.raw_os_error() {
            Some(libc::ESTALE) => Unattested::Gone(id),
            _ => Unattested::Unreadable(format!("cgroup {id}: {error}")),
        })?;
        let below = path.strip_prefix(&self.root).ok();
        let uid = below.and_then(PodUid::from_cgroup_path);
        let uid = uid.ok_or_else(|| Unattested::NotAPod(format!("{path:?}")))?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= CACHED {
            known.clear();
        }
        known.insert(id, uid.clone());
        Ok(uid)
    }

    fn path(&self, id: u64) -> io::Result<PathBuf> {
        let mut handle = Handle { bytes: 8, kind: FILEID_KERNFS, id: id.to_ne_bytes() };
        // SAFETY: the descriptor is open, and `handle` is laid out as `struct file_handle` with 8 bytes.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                self.directory.as_raw_fd(),
                &raw mut handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
    }
}

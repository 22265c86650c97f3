//! `bpf(2)` for pinned cgroup links: aya 0.14 offers no `BPF_LINK_UPDATE` for them.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use crate::error::Error;

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;
/// `enum bpf_attach_type`.
const BPF_CGROUP_INET4_CONNECT: u32 = 10;

/// `union bpf_attr`, the part for `BPF_OBJ_GET` and `BPF_OBJ_PIN`.
#[repr(C)]
struct Obj {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The part for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The part for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// The part for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// The part for `BPF_LINK_DETACH`.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// `struct bpf_link_info` with its cgroup part; other kinds of links have something else there.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    cgroup_id: u64,
    attach_type: u32,
    pad2: u32,
}

/// A link that is pinned, or was.
#[derive(Debug)]
pub(crate) struct PinnedLink(OwnedFd);

// === impl PinnedLink ===

impl PinnedLink {
    /// Opens the pin at `path`; `None` where there is none.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, Error> {
        let failed = |source| Error::Bpf { call: "BPF_OBJ_GET", path: path.to_owned(), source };
        let name = c_path(path).map_err(failed)?;
        let mut attr =
            Obj { pathname: name.as_ptr().expose_provenance() as u64, bpf_fd: 0, file_flags: 0 };
        match bpf(BPF_OBJ_GET, &mut attr) {
            // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
            Ok(fd) => Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(fd) }))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Another descriptor of the link, whose pin is or was at `path`.
    pub(crate) fn try_clone(&self, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Bpf { call: "F_DUPFD", path: path.to_owned(), source };
        self.0.try_clone().map(Self).map_err(failed)
    }

    /// Pins the link at `path` too.
    pub(crate) fn pin(&self, path: &Path) -> Result<(), Error> {
        let failed = |source| Error::Bpf { call: "BPF_OBJ_PIN", path: path.to_owned(), source };
        let name = c_path(path).map_err(failed)?;
        let bpf_fd = self.0.as_raw_fd().unsigned_abs();
        let mut attr =
            Obj { pathname: name.as_ptr().expose_provenance() as u64, bpf_fd, file_flags: 0 };
        bpf(BPF_OBJ_PIN, &mut attr).map(drop).map_err(failed)
    }

    /// The id of the cgroup that the link is attached to; 0 if the cgroup is gone, or the link is detached.
    pub(crate) fn cgroup(&self, path: &Path) -> Result<u64, Error> {
        Ok(self.info(path)?.cgroup_id)
    }

    /// The link's id.
    pub(crate) fn id(&self, path: &Path) -> Result<u32, Error> {
        Ok(self.info(path)?.id)
    }

    /// The ids of the link's program, and of its cgroup as in [`Self::cgroup`].
    pub(crate) fn attached(&self, path: &Path) -> Result<(u32, u64), Error> {
        let info = self.info(path)?;
        Ok((info.prog_id, info.cgroup_id))
    }

    /// The index of the interface that a tcx link is attached to; 0 if the interface is gone.
    pub(crate) fn interface(&self, path: &Path) -> Result<u32, Error> {
        // `{ __u32 ifindex; __u32 attach_type; }`
        let [a, b, c, d, ..] = self.info(path)?.cgroup_id.to_ne_bytes();
        Ok(u32::from_ne_bytes([a, b, c, d]))
    }

    fn info(&self, path: &Path) -> Result<LinkInfo, Error> {
        let mut info = LinkInfo::default();
        let mut attr = GetInfo {
            bpf_fd: self.0.as_raw_fd().unsigned_abs(),
            info_len: size_of::<LinkInfo>() as u32,
            info: (&raw mut info).expose_provenance() as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map_err(|source| Error::Bpf {
            call: "BPF_OBJ_GET_INFO_BY_FD",
            path: path.to_owned(),
            source,
        })?;
        Ok(info)
    }

    /// Replaces the link's program by `program`, atomically.
    pub(crate) fn update(&self, program: BorrowedFd<'_>, path: &Path) -> Result<(), Error> {
        let mut attr = LinkUpdate {
            link_fd: self.0.as_raw_fd().unsigned_abs(),
            new_prog_fd: program.as_raw_fd().unsigned_abs(),
            flags: 0,
            old_prog_fd: 0,
        };
        bpf(BPF_LINK_UPDATE, &mut attr).map(drop).map_err(|source| Error::Bpf {
            call: "BPF_LINK_UPDATE",
            path: path.to_owned(),
            source,
        })
    }

    /// Detaches the link, even if other processes have it open. Kernel 5.9, for tcx links 6.6.
    pub(crate) fn detach(&self, path: &Path) -> Result<(), Error> {
        let mut attr = LinkDetach { link_fd: self.0.as_raw_fd().unsigned_abs() };
        bpf(BPF_LINK_DETACH, &mut attr).map(drop).map_err(|source| Error::Bpf {
            call: "BPF_LINK_DETACH",
            path: path.to_owned(),
            source,
        })
    }
}

/// Attaches `program` to connect(2) of IPv4 sockets at `cgroup`, for as long as the link is open. Kernel 5.7.
pub(crate) fn connect4(program: BorrowedFd<'_>, cgroup: &File) -> io::Result<OwnedFd> {
    let [program, cgroup] = [program.as_raw_fd(), cgroup.as_raw_fd()].map(RawFd::unsigned_abs);
    create(program, cgroup, BPF_CGROUP_INET4_CONNECT)
}

/// Attaches the program with the descriptor `prog_fd` to `target`, a cgroup's descriptor or an interface's index, for as
/// long as the link is open. Kernel 5.7, for interfaces 6.6.
pub(crate) fn create(prog_fd: u32, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate { prog_fd, target_fd: target, attach_type, flags: 0 };
    let fd = bpf(BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// The attributes of a command of `bpf(2)`, as the kernel lays them out.
///
/// # Safety
///
/// It is `repr(C)`, without padding, and whatever fields of it the kernel takes as pointers are to values that outlive the
/// call: who builds one sees to that.
pub(crate) unsafe trait Attributes {}

// SAFETY: see the structures, whose fields are those of the kernel's union.
unsafe impl Attributes for Obj {}
// SAFETY: as above.
unsafe impl Attributes for GetInfo {}
// SAFETY: as above.
unsafe impl Attributes for LinkCreate {}
// SAFETY: as above.
unsafe impl Attributes for LinkUpdate {}
// SAFETY: as above.
unsafe impl Attributes for LinkDetach {}

/// Calls `bpf(2)`. The kernel treats attributes beyond the passed size as zero.
pub(crate) fn bpf<T: Attributes>(command: libc::c_int, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: the attributes are as the kernel wants them, of the size that is given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

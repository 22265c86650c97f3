//! The kernel's hooks: which programs are attached at one, and a program that does nothing, to try whether one can be.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use super::links::{Attributes, bpf};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_GET_FD_BY_ID: libc::c_int = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;

/// The most programs at one hook of one cgroup: `BPF_CGROUP_MAX_PROGS`.
const PROGRAMS: usize = 64;
/// The length of a program's name, with its final zero: `BPF_OBJ_NAME_LEN`.
const NAME: usize = 16;
/// The name of the program that does nothing.
const IDLE: &[u8] = b"kiam.preflight";
/// The licence of the program that does nothing.
const LICENCE: &CStr = c"GPL";

/// A hook at which programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hook {
    /// The name, as `bpftool` has it.
    pub(crate) name: &'static str,
    /// `enum bpf_prog_type`.
    program: u32,
    /// `enum bpf_attach_type`.
    attach: u32,
    /// The program's result that lets everything go on as without it.
    pass: i32,
    /// Whether programs there can rewrite a destination.
    pub(crate) rewrites: bool,
}

/// What is attached at a hook.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct AttachedPrograms {
    /// The kernel's ids of the programs.
    pub(crate) ids: Vec<u32>,
    /// `BPF_F_ALLOW_OVERRIDE`, `BPF_F_ALLOW_MULTI`, or 0 for a program that allows no other.
    pub(crate) flags: u32,
}

/// `union bpf_attr`, the part for `BPF_PROG_QUERY`.
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

/// The part for `BPF_PROG_GET_FD_BY_ID`.
#[repr(C)]
struct GetById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// The part for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    instructions: [u64; 2],
    load_time: u64,
    created_by_uid: u32,
    maps: u32,
    map_ids: u64,
    name: [u8; NAME],
}

/// The part for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; NAME],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

// SAFETY: see the structures, whose fields are those of the kernel's union.
unsafe impl Attributes for Query {}
// SAFETY: as above.
unsafe impl Attributes for GetById {}
// SAFETY: as above.
unsafe impl Attributes for GetInfo {}
// SAFETY: as above.
unsafe impl Attributes for Load {}

// === impl Hook ===

impl Hook {
    /// connect(2) of IPv4 sockets.
    pub(crate) const CONNECT4: Self = Self::of_addresses("connect4", 10, true);
    /// The hooks of a cgroup that the agent attaches programs to.
    pub(crate) const OF_CGROUPS: [Self; 10] = [
        Self::of_addresses("bind4", 8, false),
        Self::of_addresses("bind6", 9, false),
        Self::CONNECT4,
        Self::of_addresses("connect6", 11, true),
        Self::of_addresses("sendmsg4", 14, true),
        Self::of_addresses("sendmsg6", 15, true),
        Self::of_addresses("getpeername4", 29, false),
        Self::of_addresses("getpeername6", 30, false),
        Self { name: "sock_ops", program: 13, attach: 3, pass: 1, rewrites: false },
        Self { name: "egress", program: 8, attach: 1, pass: 1, rewrites: false },
    ];
    /// Where packets leave an interface: tcx, kernel 6.6.
    pub(crate) const TCX_EGRESS: Self =
        Self { name: "tcx/egress", program: 3, attach: 47, pass: -1, rewrites: false };

    /// A hook of `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`.
    const fn of_addresses(name: &'static str, attach: u32, rewrites: bool) -> Self {
        Self { name, program: 18, attach, pass: 1, rewrites }
    }

    /// What is attached to `cgroup` itself here.
    ///
    /// # Errors
    ///
    /// The kernel's; `EINVAL` if it has no such hook.
    pub(crate) fn attached(self, cgroup: &File) -> io::Result<AttachedPrograms> {
        let mut ids = [0_u32; PROGRAMS];
        let mut query = Query {
            target_fd: cgroup.as_raw_fd().unsigned_abs(),
            attach_type: self.attach,
            query_flags: 0,
            attach_flags: 0,
            prog_ids: ids.as_mut_ptr().expose_provenance() as u64,
            prog_cnt: PROGRAMS as u32,
            pad: 0,
        };
        match bpf(BPF_PROG_QUERY, &mut query) {
            // There are more than fit, and those that fit are there.
            Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => return Err(error),
            _ => {}
        }
        let count = (query.prog_cnt as usize).min(PROGRAMS);
        Ok(AttachedPrograms { ids: ids[..count].to_vec(), flags: query.attach_flags })
    }

    /// Attaches a program that does nothing to `target`, a cgroup's descriptor or an interface's index, and detaches it.
    ///
    /// # Errors
    ///
    /// The kernel's, when it can't be loaded or attached.
    pub(crate) fn try_at(self, target: u32) -> io::Result<()> {
        let program = self.idle()?;
        super::links::create(program.as_raw_fd().unsigned_abs(), target, self.attach).map(drop)
    }

    /// Loads a program that does nothing, which needs no feature that some kernels lack, and drops it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn try_load(self) -> io::Result<()> {
        self.idle().map(drop)
    }

    /// A program for this hook that lets everything pass.
    fn idle(self) -> io::Result<OwnedFd> {
        // `r0 = pass; exit`, as `struct bpf_insn` has it.
        let [a, b, c, d] = self.pass.to_le_bytes();
        let instructions: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, a, b, c, d], [0x95, 0, 0, 0, 0, 0, 0, 0]];
        let mut name = [0; NAME];
        name[..IDLE.len()].copy_from_slice(IDLE);
        let mut load = Load {
            prog_type: self.program,
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr().expose_provenance() as u64,
            license: LICENCE.as_ptr().expose_provenance() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
            prog_name: name,
            prog_ifindex: 0,
            expected_attach_type: self.attach,
        };
        let fd = bpf(BPF_PROG_LOAD, &mut load)?;
        // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The name of the loaded program `id`; empty if it has none.
///
/// # Errors
///
/// The kernel's, for example without `CAP_SYS_ADMIN`, or if the program is gone.
pub(crate) fn program_name(id: u32) -> io::Result<String> {
    let fd = bpf(BPF_PROG_GET_FD_BY_ID, &mut GetById { id, next_id: 0, open_flags: 0 })?;
    // SAFETY: the call succeeded, so this is a descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = ProgramInfo::default();
    let mut attr = GetInfo {
        bpf_fd: fd.as_raw_fd().unsigned_abs(),
        info_len: size_of::<ProgramInfo>() as u32,
        info: (&raw mut info).expose_provenance() as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    let end = info.name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
    Ok(String::from_utf8_lossy(&info.name[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<Load>(), 72);
        assert_eq!(std::mem::offset_of!(Load, prog_name), 48);
        assert_eq!(std::mem::offset_of!(ProgramInfo, name), 64);
        assert_eq!(size_of::<Query>(), 32);
    }
}

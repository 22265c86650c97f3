//! Programs of somebody else at a cgroup's hooks, such as a socket load balancer's.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result};

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attaching {
    /// Beside others.
    Multi,
    /// So that nobody else can attach one there or below.
    Exclusive,
}

/// A program at `connect4` of a cgroup that lets everything pass. Drop detaches it.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
    cgroup: File,
}

const PROG_LOAD: i64 = 5;
const PROG_ATTACH: i64 = 8;
const PROG_DETACH: i64 = 9;
/// `BPF_CGROUP_INET4_CONNECT`, and the type of programs there.
const CONNECT4: u32 = 10;
const SOCK_ADDR: u32 = 18;
const ALLOW_MULTI: u32 = 2;
const PROG_QUERY: i64 = 16;
/// The hooks of cgroups at which agents attach programs, as `enum bpf_attach_type` numbers them.
const HOOKS: [u32; 10] = [1, 3, 8, 9, CONNECT4, 11, 14, 15, 29, 30];

/// The part of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    licence: u64,
    log: [u32; 4],
    version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

/// The part for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    attach: u32,
    flags: u32,
}

/// The part for `BPF_PROG_QUERY`. Without room for ids, the kernel answers with their number.
#[repr(C)]
struct Query {
    target: u32,
    attach: u32,
    flags: [u32; 2],
    ids: u64,
    count: u32,
    pad: u32,
}

/// How many programs are attached to `cgroup` itself, whoever did that, at hooks that agents use.
pub fn programs_at(cgroup: &Path) -> Result<u32> {
    let cgroup = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    let mut programs = 0;
    for attach in HOOKS {
        let target = cgroup.as_raw_fd().cast_unsigned();
        let mut query = Query { target, attach, flags: [0; 2], ids: 0, count: 0, pad: 0 };
        bpf(PROG_QUERY, &mut query).context("asking for a cgroup's programs")?;
        programs += query.count;
    }
    Ok(programs)
}

// === impl ForeignProgram ===

impl ForeignProgram {
    /// Attaches one of this name, of 15 bytes at most, to `cgroup`.
    pub fn attach(cgroup: &Path, name: &str, attaching: Attaching) -> Result<Self> {
        let program = load(name).context("loading a program that lets everything pass")?;
        let cgroup = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        let flags = if attaching == Attaching::Multi { ALLOW_MULTI } else { 0 };
        let foreign = Self { program, cgroup };
        foreign.call(PROG_ATTACH, flags).context("attaching a program to a cgroup")?;
        Ok(foreign)
    }

    fn call(&self, command: i64, flags: u32) -> io::Result<i64> {
        let [target, program] = [self.cgroup.as_raw_fd(), self.program.as_raw_fd()];
        let [target, program] = [target, program].map(i32::cast_unsigned);
        bpf(command, &mut Attach { target, program, attach: CONNECT4, flags })
    }
}

impl Drop for ForeignProgram {
    fn drop(&mut self) {
        if let Err(error) = self.call(PROG_DETACH, 0) {
            eprintln!("lab: a foreign program can't be detached: {error}");
        }
    }
}

fn load(name: &str) -> io::Result<OwnedFd> {
    // `r0 = 1; exit`.
    let instructions: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let mut padded = [0; 16];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    let mut load = Load {
        kind: SOCK_ADDR,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        log: [0; 4],
        version: 0,
        flags: 0,
        name: padded,
        interface: 0,
        attach: CONNECT4,
    };
    let program = bpf(PROG_LOAD, &mut load)? as i32;
    // SAFETY: the call has just returned it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(program) })
}

fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the kernel reads and writes as much of the attributes as is said, and reads what they point to, which lives.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

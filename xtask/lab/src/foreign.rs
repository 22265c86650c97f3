//! Programs of somebody else at a cgroup's hooks, such as a socket load balancer's, and what programs there cost.

use std::{
    fs::{self, File},
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

/// A program at a hook of a cgroup that lets everything pass. Drop detaches it.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
    cgroup: File,
    hook: u32,
}

/// How often a program has run, and for how long in all, since the kernel counts that (`kernel.bpf_stats_enabled`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "a field is what its name says")]
pub struct Runs {
    pub count: u64,
    pub nanos: u64,
}

const PROG_LOAD: i64 = 5;
const PROG_ATTACH: i64 = 8;
const PROG_DETACH: i64 = 9;
/// `BPF_CGROUP_INET4_CONNECT`, and the type of programs there.
const CONNECT4: u32 = 10;
const SOCK_ADDR: u32 = 18;
const ALLOW_MULTI: u32 = 2;
const PROG_QUERY: i64 = 16;
const PROG_GET_FD_BY_ID: i64 = 13;
/// The other types of programs at cgroups' hooks, and their hooks `BPF_CGROUP_INET_EGRESS` and `BPF_CGROUP_SOCK_OPS`.
const CGROUP_SKB: u32 = 8;
const SOCK_OPS: u32 = 13;
const EGRESS: u32 = 1;
const OPERATIONS: u32 = 3;
/// More programs than anybody attaches to one hook.
const PROGRAMS: usize = 64;
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

/// The ids of the programs that are attached to `cgroup` itself at `hook`, of `enum bpf_attach_type`.
pub fn program_ids(cgroup: &Path, hook: u32) -> Result<Vec<u32>> {
    let cgroup = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
    let target = cgroup.as_raw_fd().cast_unsigned();
    let mut ids = vec![0_u32; PROGRAMS];
    let room = ids.as_mut_ptr() as u64;
    let mut query =
        Query { target, attach: hook, flags: [0; 2], ids: room, count: PROGRAMS as u32, pad: 0 };
    bpf(PROG_QUERY, &mut query).context("asking for a cgroup's programs")?;
    ids.truncate(query.count as usize);
    Ok(ids)
}

// === impl Runs ===

impl Runs {
    /// Those of the program of this `id`.
    pub fn of(id: u32) -> Result<Self> {
        let mut attr = [id, 0, 0];
        let program = bpf(PROG_GET_FD_BY_ID, &mut attr).context("opening a program")? as i32;
        // SAFETY: the call has just returned it, and nobody else has it.
        Self::read(&unsafe { OwnedFd::from_raw_fd(program) })
    }

    /// Those since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { count: self.count - before.count, nanos: self.nanos - before.nanos }
    }

    fn read(program: &OwnedFd) -> Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let number = line.with_context(|| format!("a program's {name}"))?.trim().parse();
            number.with_context(|| format!("a program's {name}"))
        };
        Ok(Self { count: field("run_cnt")?, nanos: field("run_time_ns")? })
    }
}

// === impl ForeignProgram ===

impl ForeignProgram {
    /// Attaches one of this name, of 15 bytes at most, to `cgroup`.
    pub fn attach(cgroup: &Path, name: &str, attaching: Attaching) -> Result<Self> {
        Self::attach_at(cgroup, CONNECT4, name, attaching)
    }

    /// As [`Self::attach`], at `hook`, of `enum bpf_attach_type`.
    pub fn attach_at(cgroup: &Path, hook: u32, name: &str, attaching: Attaching) -> Result<Self> {
        let program = load(name, hook).context("loading a program that lets everything pass")?;
        let cgroup = File::open(cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        let flags = if attaching == Attaching::Multi { ALLOW_MULTI } else { 0 };
        let foreign = Self { program, cgroup, hook };
        foreign.call(PROG_ATTACH, flags).context("attaching a program to a cgroup")?;
        Ok(foreign)
    }

    /// How often it has run.
    pub fn runs(&self) -> Result<Runs> {
        Runs::read(&self.program)
    }

    fn call(&self, command: i64, flags: u32) -> io::Result<i64> {
        let [target, program] = [self.cgroup.as_raw_fd(), self.program.as_raw_fd()];
        let [target, program] = [target, program].map(i32::cast_unsigned);
        bpf(command, &mut Attach { target, program, attach: self.hook, flags })
    }
}

impl Drop for ForeignProgram {
    fn drop(&mut self) {
        if let Err(error) = self.call(PROG_DETACH, 0) {
            eprintln!("lab: a foreign program can't be detached: {error}");
        }
    }
}

fn load(name: &str, hook: u32) -> io::Result<OwnedFd> {
    // `r0 = 1; exit`.
    let instructions: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let mut padded = [0; 16];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    let mut load = Load {
        kind: match hook {
            EGRESS => CGROUP_SKB,
            OPERATIONS => SOCK_OPS,
            _ => SOCK_ADDR,
        },
        count: 2,
        instructions: instructions.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        log: [0; 4],
        version: 0,
        flags: 0,
        name: padded,
        interface: 0,
        attach: hook,
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

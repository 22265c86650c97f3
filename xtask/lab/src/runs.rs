//! How often each BPF program of the machine has run, and for how long.

use std::{
    fs,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use anyhow::{Context, Result};

use super::foreign::bpf;

const PROG_GET_NEXT_ID: i64 = 11;
const PROG_GET_FD_BY_ID: i64 = 13;
const OBJ_GET_INFO_BY_FD: i64 = 15;
/// The name's place in `struct bpf_prog_info`.
const NAME: std::ops::Range<usize> = 64..80;

/// The runs of one program since the kernel counts them (`kernel.bpf_stats_enabled`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramRuns {
    /// The kernel's number for the program.
    pub id: u32,
    /// Its name, of 15 bytes at most.
    pub name: String,
    /// How often it has run.
    pub count: u64,
    /// How long, in nanoseconds.
    pub nanos: u64,
}

/// The part of `union bpf_attr` for ids.
#[repr(C)]
struct Ids {
    id: u32,
    next: u32,
    flags: u32,
}

/// The part for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct Info {
    object: u32,
    length: u32,
    info: u64,
}

/// Those of all programs.
///
/// # Errors
///
/// When the kernel refuses to say.
pub fn program_runs() -> Result<Vec<ProgramRuns>> {
    let (mut all, mut id) = (Vec::new(), 0);
    loop {
        let mut ids = Ids { id, next: 0, flags: 0 };
        // The last one has no successor.
        if bpf(PROG_GET_NEXT_ID, &mut ids).is_err() {
            return Ok(all);
        }
        id = ids.next;
        let mut ids = Ids { id, next: 0, flags: 0 };
        // It may have gone meanwhile.
        let Ok(program) = bpf(PROG_GET_FD_BY_ID, &mut ids) else { continue };
        let descriptor = RawFd::try_from(program).context("a program's descriptor")?;
        // SAFETY: the kernel has just made the descriptor for this caller alone.
        let program = unsafe { OwnedFd::from_raw_fd(descriptor) };
        all.push(ProgramRuns::of(id, &program)?);
    }
}

// === impl ProgramRuns ===

impl ProgramRuns {
    fn of(id: u32, program: &OwnedFd) -> Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let number = |name: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            found.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
        };
        let mut bytes = [0_u8; NAME.end];
        let mut info = Info {
            object: program.as_raw_fd().cast_unsigned(),
            length: NAME.end as u32,
            info: bytes.as_mut_ptr() as u64,
        };
        bpf(OBJ_GET_INFO_BY_FD, &mut info).context("asking for a program's name")?;
        let name = String::from_utf8_lossy(&bytes[NAME]);
        let name = name.trim_end_matches('\0').to_owned();
        Ok(Self { id, name, count: number("run_cnt"), nanos: number("run_time_ns") })
    }
}

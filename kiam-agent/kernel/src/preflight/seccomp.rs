//! Seccomp filters, tried by system calls that do nothing.

use std::io;

use super::privileges::PRIVILEGED;
use kiam_core::preflight::{Check, Topic::Seccomp};

/// The mode in `/proc/<pid>/status` of a process with a filter: `SECCOMP_MODE_FILTER`.
const FILTER: &str = "2";

/// A system call that the agent makes, with arguments by which the kernel does nothing.
struct HarmlessCall {
    name: &'static str,
    number: libc::c_long,
    arguments: [libc::c_long; 3],
    /// The number of the capability without which the kernel itself answers `EPERM`, if there is one.
    needs: Option<u32>,
}

const fn call(
    name: &'static str,
    number: libc::c_long,
    arguments: [libc::c_long; 3],
) -> HarmlessCall {
    HarmlessCall { name, number, arguments, needs: None }
}

/// `-1` is no command, descriptor, policy or set of flags, and 0 no address of memory.
const CALLS: [HarmlessCall; 7] = [
    HarmlessCall { needs: Some(39), ..call("bpf", libc::SYS_bpf, [-1, 0, 0]) },
    call("setns", libc::SYS_setns, [-1, 0, 0]),
    call("unshare", libc::SYS_unshare, [0, 0, 0]),
    HarmlessCall {
        needs: Some(2),
        ..call("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0])
    },
    call("inotify_init1", libc::SYS_inotify_init1, [-1, 0, 0]),
    call("sched_setscheduler", libc::SYS_sched_setscheduler, [0, -1, 0]),
    call("memfd_create", libc::SYS_memfd_create, [0, 0, 0]),
];

/// Judges the process whose `/proc/<pid>/status` this is, which must be the calling one.
pub(super) fn check(status: &str) -> Check {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    if field("Seccomp:").map(str::trim) != Some(FILTER) {
        return Check::ok(Seccomp, "no filter");
    }
    let held = field("CapEff:").and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let has = |number: u32| held.is_some_and(|held| held & (1 << number) != 0);
    let tried = CALLS.iter().filter(|call| call.needs.is_none_or(has));
    judge(tried.filter(|call| is_forbidden(&call.make())).map(|call| call.name).collect())
}

fn judge(forbidden: Vec<&str>) -> Check {
    match forbidden.is_empty() {
        true => Check::ok(Seccomp, "the filter allows the system calls that were tried"),
        false => Check::fail(
            Seccomp,
            format!("the seccomp filter forbids {}", forbidden.join(", ")),
            format!("{PRIVILEGED}, or with seccompProfile.type Unconfined"),
        ),
    }
}

/// Whether a filter answered. The kernel has other answers to these arguments.
fn is_forbidden(result: &io::Result<()>) -> bool {
    let answer = result.as_ref().err().and_then(io::Error::raw_os_error);
    matches!(answer, Some(libc::EPERM | libc::EACCES | libc::ENOSYS))
}

// === impl HarmlessCall ===

impl HarmlessCall {
    fn make(&self) -> io::Result<()> {
        let [a, b, c] = self.arguments;
        // SAFETY: none of the arguments is an address of memory, a descriptor or a command.
        let result = unsafe { libc::syscall(self.number, a, b, c) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict;

    use super::*;

    /// Otherwise the kernel's own answer would count as a filter's.
    #[test]
    fn without_a_filter_no_call_is_forbidden() {
        if lab::skip!() {
            return;
        }
        for call in &CALLS {
            let result = call.make();
            assert!(!is_forbidden(&result), "{}: {result:?}", call.name);
        }
    }

    #[test]
    fn a_forbidden_call_is_named() {
        let check = judge(vec!["bpf", "setns"]);
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.finding.ends_with("forbids bpf, setns"), "{}", check.finding);
        assert_eq!(judge(Vec::new()).verdict, Verdict::Ok);
        assert_eq!(super::check("Seccomp:\t0\n").finding, "no filter");
    }
}

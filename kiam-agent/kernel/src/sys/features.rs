//! The first kernels with the features that the agent uses, for error messages.
//!
//! The agent tries features and does not check versions, since distributors backport features. A version only explains a
//! failure.

use std::io;

use aya::programs::{ProgramError, tc::TcError};
use kiam_common::names::{map, program};

use super::rejection::kernel_release;
use crate::error::Error;

/// A feature of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Feature {
    /// The feature, as it completes "it needs".
    what: &'static str,
    /// The first kernel with the feature, and the build options that it needs.
    kernel: &'static str,
}

/// Links, by which programs are attached to cgroups.
const LINKS: Feature =
    Feature { what: "links of programs at cgroups", kernel: "5.7, with CONFIG_CGROUP_BPF" };
/// The clsact filters of `--guard=uplink` on kernels without tcx.
const CLSACT: Feature = Feature {
    what: "filters at clsact (modules sch_ingress and cls_bpf)",
    kernel: "4.5, with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF, or tcx (6.6)",
};

/// The feature that program `name` needs, if it is one of the agent's.
pub(crate) fn of_program(name: &str) -> Option<Feature> {
    let (what, kernel) = match name {
        program::BIND4 | program::BIND6 => ("programs at bind(2)", "4.17, with CONFIG_CGROUP_BPF"),
        program::NAMESPACE => {
            ("programs at bind(2) that know network namespaces", "5.7, with CONFIG_CGROUP_BPF")
        }
        program::CONNECT4 | program::CONNECT6 | program::REWRITE => (
            "programs at connect(2) that know network namespaces and cgroups",
            "5.7, with CONFIG_CGROUP_BPF",
        ),
        program::SENDMSG4 | program::SENDMSG6 => {
            ("programs at sendmsg(2)", "4.18, with CONFIG_CGROUP_BPF")
        }
        program::GETPEERNAME4 | program::GETPEERNAME6 => {
            ("programs at getpeername(2)", "5.8, with CONFIG_CGROUP_BPF")
        }
        program::SOCK_OPS => ("programs at TCP's events", "4.13, with CONFIG_CGROUP_BPF"),
        program::GUARD => ("programs at cgroups' packets", "4.10, with CONFIG_CGROUP_BPF"),
        program::LISTENER => ("BPF programs as socket filters", "3.19, with CONFIG_BPF_SYSCALL"),
        program::UPLINK => ("BPF programs as traffic classifiers", "4.1, with CONFIG_NET_CLS_ACT"),
        _ => return None,
    };
    Some(Feature { what, kernel })
}

/// The feature that map `name` needs.
pub(crate) fn of_map(name: &str) -> Feature {
    let (what, kernel) = match name {
        map::CLIENTS | map::LISTENERS | map::PASSED => {
            ("storage at sockets", "5.2, with CONFIG_NET")
        }
        map::OBSERVED => ("hash tables that forget", "4.10, with CONFIG_BPF_SYSCALL"),
        map::COUNTERS => ("arrays for each processor", "4.6, with CONFIG_BPF_SYSCALL"),
        _ => ("BPF maps", "4.4, with CONFIG_BPF_SYSCALL"),
    };
    Feature { what, kernel }
}

/// The error of a map that the kernel rejects, with a remedy.
pub(crate) fn rejected_map(name: String, source: io::Error) -> Error {
    let (release, remedy) = (kernel_release(), map_remedy(&name, &source));
    Error::RefusedMap { release, name, remedy, source }
}

fn map_remedy(name: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            "run the agent as root, or with CAP_BPF and CAP_NET_ADMIN and, before kernel 5.11, an unlimited RLIMIT_MEMLOCK".to_owned()
        }
        Some(libc::ENOMEM) => {
            "give the agent or the node more memory: from kernel 5.11 on maps count against the agent's memory limit".to_owned()
        }
        _ => of_map(name).needed(),
    }
}

/// The remedy for program `name`, which was loaded but can't be attached; empty if none is known.
pub(crate) fn attach_remedy(name: &str, error: &ProgramError) -> String {
    let (errno, feature) = match error {
        ProgramError::SyscallError(error) => (error.io_error.raw_os_error(), LINKS),
        ProgramError::TcError(TcError::NetlinkError(error)) => (error.raw_os_error(), CLSACT),
        _ => return String::new(),
    };
    unattached(name, errno, feature)
}

fn unattached(name: &str, errno: Option<i32>, feature: Feature) -> String {
    match errno {
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOENT) => {
            format!("; kernel {} can't attach {name}: {}", kernel_release(), feature.needed())
        }
        _ => String::new(),
    }
}

// === impl Feature ===

impl Feature {
    /// The end of a sentence: the needed feature, and the kernel that has it.
    pub(crate) fn needed(self) -> String {
        format!("it needs {}: kernel {}", self.what, self.kernel)
    }
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use kiam_core::telemetry::captured::CapturedLogs;

    use super::{
        super::rejection::{ProgramRejection, program_error},
        *,
    };

    /// The first kernel of what is missing, for each part and each answer of the kernel, in the message that an operator reads.
    #[test]
    fn each_message_names_what_is_missing_the_kernel_that_runs_and_the_first_that_has_it() {
        // Where one thread alone has a subscriber, another's first log line would silence that line for both.
        let _logged = CapturedLogs::start(tracing::Level::DEBUG);
        let release = kernel_release();
        let errno = io::Error::from_raw_os_error;
        let map = |name: &str, number| rejected_map(name.to_owned(), errno(number));
        let load =
            |name, number| Error::from(Box::new(ProgramRejection::new(name, errno(number), "")));
        let attach = |name, number| {
            let error = SyscallError { call: "bpf_link_create", io_error: errno(number) };
            program_error(name)(ProgramError::SyscallError(error))
        };
        let cases: [(Error, &[&str]); 15] = [
            (map(map::LISTENERS, libc::EINVAL), &["storage at sockets", "kernel 5.2"]),
            (map(map::OBSERVED, libc::EINVAL), &["hash tables that forget", "kernel 4.10"]),
            (map(map::COUNTERS, libc::EINVAL), &["arrays for each processor", "kernel 4.6"]),
            (map(map::FLOWS, libc::ENOSYS), &["BPF maps", "kernel 4.4", "CONFIG_BPF_SYSCALL"]),
            (map(map::FLOWS, libc::EPERM), &["CAP_BPF", "before kernel 5.11", "RLIMIT_MEMLOCK"]),
            (map(map::FLOWS, libc::ENOMEM), &["memory limit", "kernel 5.11"]),
            (load(program::BIND4, libc::EINVAL), &["bind(2)", "kernel 4.17"]),
            (load(program::CONNECT6, libc::EINVAL), &["connect(2)", "kernel 5.7"]),
            (load(program::SENDMSG4, libc::EINVAL), &["sendmsg(2)", "kernel 4.18"]),
            (load(program::GETPEERNAME6, libc::EINVAL), &["getpeername(2)", "kernel 5.8"]),
            (load(program::SOCK_OPS, libc::EINVAL), &["TCP's events", "kernel 4.13"]),
            (load(program::GUARD, libc::EINVAL), &["cgroups' packets", "kernel 4.10"]),
            (load(program::CONNECT4, libc::EPERM), &["CAP_BPF", "before kernel 5.11"]),
            (attach(program::CONNECT4, libc::EINVAL), &["links of programs", "kernel 5.7"]),
            (
                attach(program::SOCK_OPS, libc::EOPNOTSUPP),
                &["links of programs", "CONFIG_CGROUP_BPF"],
            ),
        ];
        for (error, expected) in cases {
            let text = error.to_string();
            assert!(text.contains(&format!("kernel {release}")), "{text}");
            for part in expected {
                assert!(text.contains(part), "{part}: {text}");
            }
            assert_eq!(text.lines().count(), 1, "{text}");
        }
        let text = unattached(program::UPLINK, Some(libc::ENOENT), CLSACT);
        for part in ["sch_ingress", "cls_bpf", "tcx (6.6)", &release] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(attach(program::BIND4, libc::EBUSY).to_string().matches("it needs").count(), 0);
    }
}

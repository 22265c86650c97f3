//! What the process may do: capabilities, and whether real-time scheduling is allowed.

use std::{fs, io, thread};

use super::{Config, lsm, seccomp};
use crate::realtime;
use kiam_core::preflight::{
    Check,
    Topic::{Capabilities, Realtime},
};

/// The remedy for a container that lacks what `privileged` gives.
pub(super) const PRIVILEGED: &str =
    "run the container with securityContext.privileged, as deploy/daemonset.yaml does";

/// A capability that the agent needs.
struct Capability {
    number: u32,
    name: &'static str,
    /// What the agent needs it for.
    what: &'static str,
    /// Whether it is needed only to change traffic.
    enforces: bool,
}

const fn needed(number: u32, name: &'static str, what: &'static str) -> Capability {
    Capability { number, name, what, enforces: false }
}

const fn enforcing(number: u32, name: &'static str, what: &'static str) -> Capability {
    Capability { number, name, what, enforces: true }
}

/// `CAP_SYS_ADMIN`, which includes `CAP_BPF` and `CAP_PERFMON`.
const SYS_ADMIN: u32 = 21;
/// `CAP_BPF` and `CAP_PERFMON`. Kernel 5.8.
const PARTS_OF_SYS_ADMIN: [u32; 2] = [39, 38];

/// The numbers are those of `linux/capability.h`.
const NEEDED: [Capability; 7] = [
    needed(39, "CAP_BPF", "load the kernel programs"),
    needed(38, "CAP_PERFMON", "load the kernel programs"),
    needed(12, "CAP_NET_ADMIN", "attach the programs, set routing rules"),
    needed(2, "CAP_DAC_READ_SEARCH", "find a cgroup by its id"),
    enforcing(SYS_ADMIN, "CAP_SYS_ADMIN", "enter pods' network namespaces"),
    enforcing(19, "CAP_SYS_PTRACE", "see which network namespace a pod's process is in"),
    enforcing(13, "CAP_NET_RAW", "test that raw packets are stopped"),
];

pub(super) fn checks(node: &Config) -> Vec<Check> {
    if node.intercept.is_none() {
        return Vec::new();
    }
    let status = fs::read_to_string("/proc/thread-self/status");
    let users = fs::read_to_string("/proc/thread-self/uid_map");
    let status = match status {
        Ok(status) => status,
        Err(error) => return unreadable(&error),
    };
    let lacking = effective(&status);
    let mut checks = vec![
        capabilities(lacking, users.as_deref().unwrap_or_default(), node.enforcing().is_some()),
        seccomp::check(&status),
    ];
    checks.extend(lsm::checks());
    checks.extend(node.enforcing().map(|_| real_time()));
    checks
}

fn unreadable(error: &io::Error) -> Vec<Check> {
    let finding = format!("/proc/thread-self/status can't be read: {error}");
    vec![Check::unknown(Capabilities, finding, "mount proc at /proc")]
}

/// The effective capabilities in `/proc/<pid>/status`, as bits.
fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

/// Judges the capabilities `held`, in the user namespace with the map `users`.
fn capabilities(held: Option<u64>, users: &str, enforces: bool) -> Check {
    let Some(held) = held else {
        let finding = "/proc/thread-self/status names no capabilities (CapEff)";
        return Check::unknown(Capabilities, finding, "look at `capsh --print` in the container");
    };
    // The initial user namespace alone has all ids, and bpf(2) counts only capabilities there.
    if users.split_ascii_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"] {
        return Check::fail(
            Capabilities,
            "the process is in a user namespace of its own, whose capabilities do not count for bpf(2)",
            "leave hostUsers: false out of the pod, and run the agent on the node itself, not in a rootless container",
        );
    }
    let has = |number: u32| held & (1 << number) != 0;
    let lacks = |capability: &&Capability| {
        let included = PARTS_OF_SYS_ADMIN.contains(&capability.number) && has(SYS_ADMIN);
        !has(capability.number) && !included && (enforces || !capability.enforces)
    };
    let lacking: Vec<String> = NEEDED
        .iter()
        .filter(lacks)
        .map(|Capability { name, what, .. }| format!("{name} ({what})"))
        .collect();
    match lacking.is_empty() {
        true => Check::ok(Capabilities, "the process has all that the agent needs"),
        false => Check::fail(Capabilities, format!("missing: {}", lacking.join(", ")), PRIVILEGED),
    }
}

/// Tries whether a thread can be scheduled before ordinary ones, as the one that renews the lease is.
fn real_time() -> Check {
    let tried = thread::Builder::new().name("preflight".to_owned()).spawn(realtime::enter);
    let result = tried.and_then(|thread| thread.join().unwrap_or(Ok(())));
    match result {
        Ok(()) => Check::ok(Realtime, "the lease can be renewed on a busy node, too"),
        Err(error) => Check::warn(
            Realtime,
            format!(
                "a thread can't have SCHED_FIFO: {error}; on a busy node the lease may be renewed too late, and pods are denied meanwhile"
            ),
            "give the container CAP_SYS_NICE, and choose a kernel without CONFIG_RT_GROUP_SCHED",
        ),
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict;

    use super::*;

    const INITIAL: &str = "         0          0 4294967295\n";
    const ALL: u64 = 0x1ff_ffff_ffff;

    fn without(numbers: &[u32]) -> u64 {
        numbers.iter().fold(ALL, |held, number| held & !(1 << number))
    }

    #[test]
    fn each_missing_capability_is_named_with_what_it_is_for() {
        for capability in &NEEDED {
            // CAP_SYS_ADMIN includes those.
            let mut missing = vec![capability.number];
            if PARTS_OF_SYS_ADMIN.contains(&capability.number) {
                missing.push(SYS_ADMIN);
            }
            let check = capabilities(Some(without(&missing)), INITIAL, true);
            assert_eq!(check.verdict, Verdict::Fail);
            assert!(check.finding.contains(capability.name), "{}", check.finding);
            assert!(check.finding.contains(capability.what), "{}", check.finding);
            let observing = capabilities(Some(without(&[capability.number])), INITIAL, false);
            let included = PARTS_OF_SYS_ADMIN.contains(&capability.number);
            let fails = !capability.enforces && !included;
            assert_eq!(observing.verdict == Verdict::Fail, fails, "{}", capability.name);
        }
        assert_eq!(capabilities(Some(ALL), INITIAL, true).verdict, Verdict::Ok);
        assert_eq!(capabilities(None, INITIAL, true).verdict, Verdict::Unknown);
    }

    #[test]
    fn capabilities_of_a_user_namespace_do_not_count() {
        for users in ["0 1000 1\n", "0 0 4294967294\n", ""] {
            let check = capabilities(Some(ALL), users, true);
            assert_eq!(check.verdict, Verdict::Fail, "{users:?}");
            assert!(check.finding.contains("user namespace"), "{}", check.finding);
        }
    }

    #[test]
    fn the_kernels_spelling_is_understood() {
        let status = "Name:\tcat\nCapPrm:\t0\nCapEff:\t000001fffeffffff\nCapBnd:\t0\n";
        assert_eq!(effective(status), Some(0x1ff_feff_ffff));
        assert_eq!(effective("CapEff:\tx\n"), None);
        assert_eq!(effective(""), None);
    }
}

//! A Kubernetes node without Kubernetes: namespaces, veths, cgroups and servers that are real to the kernel and the agent.
//!
//! Everything has a name of its own per process, uses private ranges inside its own namespaces, and goes away on Drop;
//! what a killed run left (cgroups and mounts named after a process that is gone) goes when the next one starts.

use std::env;

mod agent;
mod arrivals;
mod ask;
mod attacker;
mod cgroup;
mod check;
pub mod demo;
pub mod fake;
mod foreign;
mod hostile;
pub mod loopback;
pub mod monitoring;
mod netns;
mod node;
mod pod;
pub mod pod_client;
mod process;
pub mod prometheus;
mod refusal;
pub mod runtime;
mod sweep;
mod world;

pub use agent::{AGENT_PORT, Agent, READY_LIMIT};
pub use arrivals::Arrivals;
pub use ask::{Asking, Meanwhile, agent_binary, ask_by, client_binary};
pub use attacker::Attacker;
pub use cgroup::{Cgroup, Layout, mount_point as cgroup_mount_point};
pub use check::{eventually, eventually_is};
pub use foreign::{Attaching, ForeignProgram, Runs, program_ids, programs_at};
pub use hostile::{Neighbour, Victim};
pub use netns::{Netns, has_ipv6, has_mptcp, tells_namespaces_apart};
pub use node::{IMDS_V4, IMDS_V6, NODE_NAME, NODE_V4, NODE_V6, Node};
pub use pod::{LabPod, PodSpec};
pub use process::Process;
pub use refusal::Refusal;
pub use world::{Lab, role_arn, role_base_arn};

/// Set where a skipped test is a failure, as in CI.
pub const NO_SKIP: &str = "KIAM_TEST_NO_SKIP";

/// Whether this machine lets us make namespaces, cgroups and mounts.
pub fn available() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root".to_owned());
    }
    cgroup::mount_point().map_err(|error| format!("{error:#}"))?;
    Netns::create().map(drop).map_err(|error| format!("{error:#}"))
}

/// The [`Lab`] of the calling test, or `None` where [`skip!`] says so.
///
/// # Panics
///
/// When the node can't be made.
#[macro_export]
macro_rules! node_test {
    () => {
        if $crate::skip!() { None } else { Some($crate::Lab::start().expect("the lab starts")) }
    };
}

/// Whether the calling test must be left out; prints the reason, with the test's name.
///
/// # Panics
///
/// When it must, and [`NO_SKIP`] is set.
#[macro_export]
macro_rules! skip {
    () => {{
        fn here() {}
        $crate::skip(::std::any::type_name_of_val(&here))
    }};
}

/// What [`skip!`] asks; `here` is the path of a function in the test.
#[doc(hidden)]
#[must_use]
pub fn skip(here: &str) -> bool {
    let Err(reason) = available() else { return false };
    let test = here.trim_end_matches("::here").trim_end_matches("::{{closure}}");
    assert!(env::var_os(NO_SKIP).is_none(), "{test} can't run, and {NO_SKIP} is set: {reason}");
    eprintln!("skipped: {test}: {reason}");
    true
}

/// The [`Lab`] of the calling test, or `None` where [`skip!`] or [`no_netns_cookies`] says so.
///
/// # Panics
///
/// When the node can't be made.
#[macro_export]
macro_rules! pod_local_test {
    () => {
        if $crate::skip!() || $crate::no_netns_cookies() {
            None
        } else {
            Some($crate::Lab::start().expect("the lab starts"))
        }
    };
}

/// Whether the calling test must be left out because its subject is what the agent does only where the kernel distinguishes
/// network namespaces, such as the listeners inside pods; prints the reason, with the test's name.
///
/// # Panics
///
/// When the kernel can't be asked.
#[must_use]
pub fn no_netns_cookies() -> bool {
    let has_cookies = tells_namespaces_apart().expect("a socket can be asked");
    !has_cookies && left_out("no `SO_NETNS_COOKIE` below kernel 5.14")
}

/// Whether the calling test must be left out because the kernel has no MPTCP; prints so.
#[must_use]
pub fn no_mptcp() -> bool {
    !has_mptcp() && left_out("the kernel was built without MPTCP")
}

/// Whether the kernel has tcx links, by its release.
///
/// # Panics
///
/// When `/proc` does not say the release.
#[must_use]
pub fn has_tcx() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|text| text.parse().ok());
    let mut next = || numbers.next().flatten().unwrap_or(0_u32);
    (next(), next()) >= (6, 6)
}

/// Whether the calling test must be left out because the kernel has no tcx links; prints so.
#[must_use]
pub fn no_tcx() -> bool {
    !has_tcx() && left_out("no tcx links below kernel 6.6")
}

/// Whether the calling test must be left out because `folder`, which is made, is in memory, so that nothing there outlives a
/// boot; prints so.
///
/// # Panics
///
/// When the folder can't be made.
#[must_use]
pub fn no_disk(folder: &std::path::Path) -> bool {
    std::fs::create_dir_all(folder).expect("the folder can be made");
    let kind = rustix::fs::statfs(folder).expect("the folder has a file system").f_type;
    // <https://man7.org/linux/man-pages/man2/statfs.2.html>: ramfs and tmpfs.
    [0x8584_58f6, 0x0102_1994].contains(&kind) && left_out("the machine has no disk")
}

/// Whether the calling test must be left out because `program`, whose judgement it is about, is not installed; prints so.
#[must_use]
pub fn no_program(program: &str) -> bool {
    let installed = std::process::Command::new(program).arg("--version").output();
    !installed.is_ok_and(|output| output.status.success())
        && left_out(&format!("no {program} is installed"))
}

/// Says that the calling test has no subject on this kernel; `cargo xtask test kernels` lists it in docs/kernels.md.
fn left_out(reason: &str) -> bool {
    // Named after its test.
    let thread = std::thread::current();
    println!("left out: {}: {reason}", thread.name().unwrap_or_default());
    true
}

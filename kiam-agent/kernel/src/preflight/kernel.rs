//! The kernel, and whether it takes the agent's programs.

use std::io;

use super::Config;
use crate::{
    intercept::{check, verify_all},
    sys::{hooks::Hook, netns::host_netns, rejection::kernel_release},
};
use kiam_core::preflight::{
    Check,
    Topic::{Kernel, Programs},
};

pub(super) fn checks(node: &Config) -> Vec<Check> {
    if node.intercept.is_none() {
        return Vec::new();
    }
    vec![kernel(node), programs(node)]
}

fn kernel(node: &Config) -> Check {
    let release = kernel_release();
    let told = host_netns();
    if let Some(config) = node.enforcing()
        && let Err(error) = check(config)
    {
        return Check::fail(
            Kernel,
            error.to_string(),
            "choose a node image with kernel 5.14 or newer (docs/kernels.md), or --path=auto",
        );
    }
    match told {
        Ok(Some(_)) => Check::ok(Kernel, format!("{release}: it tells network namespaces apart")),
        Ok(None) if node.enforcing().is_some() => Check::warn(
            Kernel,
            format!(
                "{release}: it can't distinguish network namespaces (5.14 can), so that all pods use the node listener and are identified by their published addresses"
            ),
            "choose a node image with kernel 5.14 or newer for pod listeners: docs/kernels.md",
        ),
        Ok(None) => Check::ok(Kernel, format!("{release}: it can observe")),
        Err(error) => unasked(&release, &error),
    }
}

fn unasked(release: &str, error: &io::Error) -> Check {
    Check::fail(
        Kernel,
        format!(
            "{release}: it does not say which network namespace this is (SO_NETNS_COOKIE): {error}"
        ),
        "look for a seccomp filter or a security module that forbids getsockopt(2)",
    )
}

fn programs(node: &Config) -> Check {
    let Some(config) = &node.intercept else {
        return Check::ok(Programs, "none are needed");
    };
    // Otherwise the loader takes a prohibition for an old kernel, and its errors are about that.
    if let Err(error) = Hook::CONNECT4.try_load() {
        return unloadable(&error);
    }
    match verify_all(config, node.target()) {
        Ok(count) => {
            Check::ok(Programs, format!("the kernel loads all {count}; they were dropped again"))
        }
        Err(error) => Check::failed(
            Programs,
            &error,
            "docs/kernels.md has the kernels that load the programs, and what each lacks",
        ),
    }
}

fn unloadable(error: &io::Error) -> Check {
    let finding = format!("the kernel loads no program: {error}");
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Check::fail(
            Programs,
            finding,
            "run the agent as root, with CAP_BPF and CAP_NET_ADMIN: see capabilities, seccomp, apparmor and selinux",
        ),
        Some(libc::ENOSYS) => Check::fail(
            Programs,
            finding,
            "choose a kernel with CONFIG_BPF_SYSCALL, or see seccomp",
        ),
        _ => Check::fail(Programs, finding, "docs/kernels.md has what each kernel lacks"),
    }
}

//! Security modules: AppArmor, SELinux and lockdown.
//!
//! None of them says in advance what it denies, so their lines tell what to look at. Whether the kernel programs can be
//! loaded and attached is tried by other checks.

use std::{fs, io, path::Path};

use rustix::{
    fs::{Mode, OFlags, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use super::privileges::PRIVILEGED;
use kiam_core::preflight::{
    Check,
    Topic::{Apparmor, Lockdown, Selinux},
};

/// SELinux types of privileged containers, which may do what root may: on most distributions, and on Bottlerocket.
const PRIVILEGED_TYPES: [&str; 4] = ["spc_t", "super_t", "unconfined_t", "unconfined_service_t"];

/// Judges this process.
pub(super) fn checks() -> Vec<Check> {
    let read = |path: &str| fs::read_to_string(path).ok();
    let enabled = read("/sys/module/apparmor/parameters/enabled");
    // The second path is shared by all modules: it is AppArmor's only where that is the first of them.
    let profile = read("/proc/self/attr/apparmor/current").or_else(|| {
        let shared = read("/proc/self/attr/current");
        shared.filter(|text| !text.trim_end_matches(['\0', '\n']).contains(':'))
    });
    let context = read("/proc/self/attr/current");
    vec![
        apparmor(enabled.as_deref(), profile.as_deref()),
        selinux(
            context.as_deref(),
            node_file("/sys/fs/selinux", "selinuxfs", "enforce").ok().as_deref(),
        ),
        lockdown(node_file("/sys/kernel/security", "securityfs", "lockdown")),
    ]
}

/// The file `name` of the file system of this `kind`, which is mounted at `folder`. In a container it is not, so it is
/// mounted for the moment of the read, where nobody else sees it.
fn node_file(folder: &str, kind: &str, name: &str) -> io::Result<String> {
    fs::read_to_string(Path::new(folder).join(name)).or_else(|_| {
        let system = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&system)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
        let mount = fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        let file = openat(&mount, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        io::read_to_string(fs::File::from(file))
    })
}

/// Judges `/sys/module/apparmor/parameters/enabled` and the process's profile, such as `cri-containerd.apparmor.d (enforce)`.
fn apparmor(enabled: Option<&str>, profile: Option<&str>) -> Check {
    if enabled.map(str::trim) != Some("Y") {
        return Check::ok(Apparmor, "it is off");
    }
    let Some(profile) = profile.map(|text| text.trim_end_matches(['\0', '\n'])) else {
        let finding = "it is on, and the profile of this process can't be read";
        return Check::unknown(Apparmor, finding, "aa-status on the node lists the processes");
    };
    match profile.strip_suffix(" (enforce)") {
        Some(name) => Check::warn(
            Apparmor,
            format!("the profile {name} confines the agent"),
            format!(
                "{PRIVILEGED}, which runs it unconfined; or set appArmorProfile.type Unconfined"
            ),
        ),
        None => Check::ok(Apparmor, format!("the process is {profile}")),
    }
}

/// Judges the process's context, such as `system_u:system_r:spc_t:s0`, and selinuxfs's `enforce`.
fn selinux(context: Option<&str>, enforce: Option<&str>) -> Check {
    let context = context.map(|text| text.trim_end_matches(['\0', '\n']));
    let kind = context.and_then(|context| context.split(':').nth(2));
    let Some(kind) = kind else { return Check::ok(Selinux, "it is off") };
    match enforce.map(str::trim) {
        Some("0") => Check::ok(Selinux, format!("permissive; the process has the type {kind}")),
        _ if PRIVILEGED_TYPES.contains(&kind) => Check::ok(
            Selinux,
            format!("the process has the type {kind}, as privileged containers do"),
        ),
        Some(_) => Check::warn(
            Selinux,
            format!("enforcing; the type {kind} of this process may confine the agent"),
            format!("{PRIVILEGED}; ausearch -m avc on the node shows what was denied"),
        ),
        None => Check::unknown(
            Selinux,
            format!(
                "the process has the type {kind}; selinuxfs can't be read, so it is not known whether that is enforced"
            ),
            format!("{PRIVILEGED}; getenforce on the node says whether it is"),
        ),
    }
}

/// Judges securityfs's `lockdown`, such as `none [integrity] confidentiality`.
fn lockdown(text: io::Result<String>) -> Check {
    let text = match text {
        Ok(text) => text,
        // The file system is there, and has no such file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Check::ok(Lockdown, "the kernel has none");
        }
        Err(error) => {
            let finding = format!("securityfs can't be read: {error}");
            return Check::unknown(Lockdown, finding, "nothing: the agent runs in every mode");
        }
    };
    let mode = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    match mode {
        Some(("none", _)) => Check::ok(Lockdown, "none"),
        Some((mode, _)) => {
            Check::ok(Lockdown, format!("{mode}, in which the agent runs: docs/kernels.md"))
        }
        None => {
            let finding = format!("securityfs names no mode: {:?}", text.trim());
            Check::unknown(Lockdown, finding, "nothing: the agent runs in every mode")
        }
    }
}

#[cfg(test)]
mod tests {
    use kiam_core::preflight::Verdict::{self, Ok as Good, Unknown, Warn};

    use super::*;

    #[track_caller]
    fn assert_says(check: &Check, verdict: Verdict, says: &str) {
        assert_eq!(check.verdict, verdict, "{check:?}");
        assert!(check.finding.contains(says), "{check:?}");
    }

    /// Texts as Ubuntu 22.04 and containerd have them.
    #[test]
    fn a_profile_in_force_is_named() {
        let cases = [
            (None, None, Good, "off"),
            (Some("N\n"), Some("unconfined\n"), Good, "off"),
            (Some("Y\n"), Some("unconfined\n"), Good, "unconfined"),
            (
                Some("Y\n"),
                Some("cri-containerd.apparmor.d (enforce)\n"),
                Warn,
                "profile cri-containerd.apparmor.d confines",
            ),
            (Some("Y\n"), Some("docker-default (complain)\n"), Good, "docker-default (complain)"),
            (Some("Y\n"), Some("a b (enforce)\0"), Warn, "profile a b confines"),
            (Some("Y\n"), None, Unknown, "can't be read"),
        ];
        for (enabled, profile, verdict, says) in cases {
            assert_says(&apparmor(enabled, profile), verdict, says);
        }
    }

    /// Contexts as Fedora, Bottlerocket and RKE2 document them.
    #[test]
    fn a_type_that_confines_is_named() {
        let container = Some("system_u:system_r:container_t:s0:c829,c861\0");
        let cases = [
            (None, None, Good, "off"),
            (Some("unconfined\n"), None, Good, "off"),
            (Some("system_u:system_r:spc_t:s0\0"), Some("1"), Good, "type spc_t"),
            (Some("system_u:system_r:super_t:s0-s0:c0.c1023\0"), None, Good, "type super_t"),
            (container, Some("0"), Good, "permissive"),
            (container, Some("1"), Warn, "enforcing; the type container_t"),
            (container, None, Unknown, "container_t"),
        ];
        for (context, enforce, verdict, says) in cases {
            assert_says(&selinux(context, enforce), verdict, says);
        }
    }

    #[test]
    fn every_lockdown_mode_is_fine_and_named() {
        let cases = [
            ("[none] integrity confidentiality\n", Good, "none"),
            ("none [integrity] confidentiality\n", Good, "integrity, in which"),
            ("none integrity [confidentiality]\n", Good, "confidentiality, in which"),
            ("none\n", Unknown, "names no mode: \"none\""),
        ];
        for (text, verdict, says) in cases {
            assert_says(&lockdown(Ok(text.to_owned())), verdict, says);
        }
        let errno = |number| Err(io::Error::from_raw_os_error(number));
        assert_says(&lockdown(errno(libc::ENOENT)), Good, "has none");
        assert_says(&lockdown(errno(libc::EPERM)), Unknown, "securityfs can't be read");
    }

    /// In this test's mount namespace the file system may be mounted, or not.
    #[test]
    fn a_file_system_is_read_without_being_mounted() {
        if lab::skip!() {
            return;
        }
        let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
        let before = mounts();
        let pid_max = node_file("/nowhere", "proc", "sys/kernel/pid_max").unwrap();
        assert!(pid_max.trim().parse::<u32>().is_ok(), "{pid_max}");
        assert_eq!(mounts(), before);
        let error = node_file("/nowhere", "no such", "lockdown").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}

//! What the kernel, the container or the node's files lack.

use std::fs;

use kiam_core::preflight::{
    Topic::{
        BootGuard, Bpffs, Capabilities, Cgroup, Flags, Hooks, Inotify, Kernel, OpenFiles,
        Processes, Programs, Realtime, Seccomp, StateDir,
    },
    Verdict::{Fail, Ok as Good, Unknown, Warn},
};
use lab::{Attaching, ForeignProgram, Lab, PodSpec};

use super::{Row, row, run::Setting};

/// The option of a socket that names its network namespace, which kernels below 5.14 do not know.
const NETNS_COOKIE: Option<(u32, u32)> = Some((2, 71));

/// Without these capabilities, as `setpriv` drops them.
fn dropping(capabilities: &str) -> Setting {
    Setting::by(&["setpriv", &format!("--bounding-set={capabilities}")])
}

/// With `text` in place of a file of the kernel.
fn with_file(lab: &Lab, path: &str, text: &str) -> Setting {
    let file = lab.node.folder().join("file");
    fs::write(&file, text).unwrap();
    Setting::in_mounts(&format!("mount --bind {} {path}", file.display()))
}

/// With a program of this name above the pods' cgroup.
fn foreign(lab: &Lab, name: &str, attaching: Attaching) -> Setting {
    let program = ForeignProgram::attach(lab.node.root_cgroup(), name, attaching).unwrap();
    Setting::default().holding(program)
}

/// With a pod whose process is there.
fn with_pod(lab: &Lab, setting: Setting) -> Setting {
    setting.holding(lab.pod(PodSpec::new("shop", "orders").role("orders")).unwrap())
}

pub(super) const ROWS: &[Row] = &[
    row("risky flags", Flags, Warn, &["--namespace-policy=optional", "docs/flags.md"], |_| {
        Setting::flags(&["--namespace-policy=optional"])
    }),
    row("an unknown variable", Flags, Warn, &["KIAM_PROT"], |_| {
        Setting::default().variable("KIAM_PROT", "3100")
    }),
    row("an older kernel", Kernel, Warn, &["can't distinguish", "5.14"], |_| {
        Setting::forbidding((libc::SYS_getsockopt, NETNS_COOKIE, libc::ENOPROTOOPT))
    }),
    row(
        "an older kernel, pod listeners",
        Kernel,
        Fail,
        &["--path=pod-local needs", "--path=auto"],
        |_| {
            Setting::forbidding((libc::SYS_getsockopt, NETNS_COOKIE, libc::ENOPROTOOPT))
                .and_flags(&["--path=pod-local"])
        },
    ),
    row("getsockopt forbidden", Kernel, Fail, &["SO_NETNS_COOKIE", "seccomp"], |_| {
        Setting::forbidding((libc::SYS_getsockopt, NETNS_COOKIE, libc::EPERM))
    }),
    row("no program can be loaded", Programs, Fail, &["loads no program", "CAP_BPF"], |_| {
        Setting::forbidding((libc::SYS_bpf, Some((0, 5)), libc::EPERM))
    }),
    row("no map can be made", Programs, Fail, &["can't create map", "kernel"], |_| {
        Setting::forbidding((libc::SYS_bpf, Some((0, 0)), libc::EINVAL))
    }),
    row("programs of all flags", Programs, Good, &["loads all 13"], |_| {
        Setting::flags(&["--guard=route,skb,uplink", "--host-network-pods=intercept"])
    }),
    row(
        "no CAP_NET_ADMIN",
        Capabilities,
        Fail,
        &["missing: CAP_NET_ADMIN (", "privileged"],
        |_| dropping("-net_admin"),
    ),
    row("no CAP_SYS_ADMIN", Capabilities, Fail, &["missing: CAP_SYS_ADMIN (enter"], |_| {
        dropping("-sys_admin")
    }),
    row("no CAP_BPF", Capabilities, Good, &[], |_| dropping("-bpf,-perfmon")),
    row(
        "no CAP_BPF either",
        Capabilities,
        Fail,
        &["CAP_BPF", "CAP_PERFMON", "CAP_SYS_ADMIN"],
        |_| dropping("-bpf,-perfmon,-sys_admin"),
    ),
    row("no CAP_SYS_PTRACE, observing", Capabilities, Good, &[], |_| {
        dropping("-sys_ptrace").and_flags(&["--mode=observe"])
    }),
    row("a user namespace", Capabilities, Fail, &["user namespace", "hostUsers"], |_| {
        Setting::by(&["unshare", "--user", "--map-root-user"])
    }),
    row("bpf(2) forbidden", Seccomp, Fail, &["forbids bpf", "Unconfined"], |_| {
        Setting::forbidding((libc::SYS_bpf, None, libc::EPERM))
    }),
    row("memfd_create(2) forbidden", Seccomp, Fail, &["forbids memfd_create"], |_| {
        Setting::forbidding((libc::SYS_memfd_create, None, libc::ENOSYS))
    }),
    row("a filter for something else", Seccomp, Good, &["the filter allows"], |_| {
        Setting::forbidding((libc::SYS_acct, None, libc::EPERM))
    }),
    row("no CAP_SYS_NICE", Realtime, Warn, &["SCHED_FIFO", "CAP_SYS_NICE"], |_| {
        dropping("-sys_nice")
    }),
    row("no cgroup v2", Cgroup, Fail, &["No such file", "--cgroup"], |lab| {
        Setting::in_mounts(&format!("umount {}", mount_of(lab)))
    }),
    row("no pods' cgroup", Cgroup, Fail, &["/nowhere", "name an absolute directory"], |_| {
        Setting::flags(&["--cgroup=/nowhere"])
    }),
    row("no pods' cgroup, hooks", Hooks, Unknown, &["see cgroup"], |_| {
        Setting::flags(&["--cgroup=/nowhere"])
    }),
    row("another program", Hooks, Warn, &["balancer (connect4)", "whose they are"], |lab| {
        foreign(lab, "balancer", Attaching::Multi)
    }),
    row("Cilium's program", Hooks, Warn, &["cil_sock4_conne (connect4)", "uplink"], |lab| {
        foreign(lab, "cil_sock4_conne", Attaching::Multi)
    }),
    row(
        "Cilium's program, uplinks guarded",
        Hooks,
        Good,
        &["Cilium, with --guard=uplink"],
        |lab| {
            foreign(lab, "cil_sock4_conne", Attaching::Multi).and_flags(&["--guard=route,uplink"])
        },
    ),
    row("a program that allows no other", Hooks, Fail, &["alone at", "BPF_F_ALLOW_MULTI"], |lab| {
        foreign(lab, "alone", Attaching::Exclusive)
    }),
    row(
        "links forbidden",
        Hooks,
        Fail,
        &["no program can be attached at bind4", "docs/kernels.md"],
        |_| {
            let link_create = Some((0, 28));
            Setting::forbidding((libc::SYS_bpf, link_create, libc::EINVAL))
        },
    ),
    row("no hostPID", Processes, Fail, &["can't be seen", "hostPID: true"], |lab| {
        with_pod(lab, Setting::by(&["unshare", "--pid", "--fork", "--mount-proc"]))
    }),
    row("no hostPID, no pod", Processes, Unknown, &["among 0 pods", "hostPID"], |_| {
        Setting::by(&["unshare", "--pid", "--fork", "--mount-proc"])
    }),
    row("a pod that is seen", Processes, Good, &["of 1 pod "], |lab| {
        with_pod(lab, Setting::default())
    }),
    row("no inotify instance", Inotify, Fail, &["max_user_instances"], |_| {
        Setting::forbidding((libc::SYS_inotify_init1, None, libc::EMFILE))
    }),
    row("no inotify watch", Inotify, Fail, &["max_user_watches"], |_| {
        Setting::forbidding((libc::SYS_inotify_add_watch, None, libc::ENOSPC))
    }),
    row("few inotify watches", Inotify, Warn, &["= 1500", "needs 2000"], |lab| {
        with_file(lab, "/proc/sys/fs/inotify/max_user_watches", "1500\n")
    }),
    row("few open files", OpenFiles, Warn, &["the limit is 1024", "LimitNOFILE"], |_| {
        Setting::by(&["prlimit", "--nofile=1024:1024"])
    }),
    row("no bpffs", Bpffs, Fail, &["not on a BPF file system", "mount -t bpf"], |lab| {
        Setting::in_mounts(&format!("umount {}", lab.node.bpffs().display()))
    }),
    row("a read-only bpffs", Bpffs, Fail, &["read-only", "--bpffs"], |lab| {
        Setting::in_mounts(&format!("mount -o remount,ro,bind {}", lab.node.bpffs().display()))
    }),
    row("a newer layout", Bpffs, Fail, &["layout v99", "uninstall"], |lab| {
        fs::create_dir_all(lab.pins().join("v99")).unwrap();
        Setting::default()
    }),
    row("a read-only state folder", StateDir, Fail, &["read-only", "--state-dir"], |lab| {
        fs::create_dir_all(lab.state()).unwrap();
        let state = lab.state().display().to_string();
        Setting::in_mounts(&format!(
            "mount --bind {state} {state} && mount -o remount,ro,bind {state}"
        ))
    }),
    row(
        "a boot guard's folder in memory",
        BootGuard,
        Fail,
        &["survive a reboot", "/etc/systemd/system"],
        |lab| {
            let folder = lab.node.folder().join("units");
            fs::create_dir_all(&folder).unwrap();
            let script = format!("mount -t tmpfs -o mode=755 tmpfs {}", folder.display());
            Setting::in_mounts(&script).and_flags(&[&format!("--boot-guard={}", folder.display())])
        },
    ),
    row(
        "a boot guard's folder that others write",
        BootGuard,
        Fail,
        &["users other than root"],
        |_| Setting::flags(&["--boot-guard=/tmp"]),
    ),
];

/// Where the lab's cgroups are mounted.
fn mount_of(lab: &Lab) -> String {
    lab.node.root_cgroup().parent().unwrap().display().to_string()
}

//! The flags of interception and of the callers' identity.

use std::{net::SocketAddr, path::PathBuf};

use super::{DAY, Identity, SECOND, flags::Flags, values::Mistakes};
use kiam_kernel::intercept;

/// The interception, `None` without an interceptor, and how callers are identified.
pub(super) fn interception(
    flags: &Flags,
    mistakes: &mut Mistakes,
) -> (Option<intercept::Config>, Identity) {
    let on = mistakes.one_of("interceptor", &flags.interceptor, &[("ebpf", true), ("off", false)]);
    let words = [("kernel", Identity::Kernel), ("source-ip", Identity::SourceIp)];
    let asked = flags.identity.as_ref().and_then(|text| mistakes.one_of("identity", text, &words));
    let host_network = mistakes.host_network(&flags.host_network_pods);
    let guard = mistakes.guard(flags, host_network);
    let bpffs = mistakes.folder("bpffs", &flags.bpffs);
    let boot_guard = boot_guard(flags, mistakes);
    let cgroup = flags.cgroup.as_ref().and_then(|text| mistakes.folder("cgroup", text));
    if on == Some(false) {
        if asked == Some(Identity::Kernel) {
            mistakes.add("identity", "kernel needs --interceptor=ebpf: with off, use source-ip");
        }
        path(flags, Identity::SourceIp, mistakes);
        return (None, Identity::SourceIp);
    }
    let identity = asked.unwrap_or(Identity::Kernel);
    let selftest_interval =
        mistakes.duration("selftest-interval", &flags.selftest_interval, SECOND, DAY);
    let words = [("enforce", intercept::Mode::Enforce), ("observe", intercept::Mode::Observe)];
    let mode = mistakes.one_of("mode", &flags.mode, &words);
    let path = path(flags, identity, mistakes);
    let guard = guard.unwrap_or_default();
    let required = bpffs.zip(host_network).zip(mode).zip(path);
    let config = required.map(|(((bpffs, host_network), mode), path)| intercept::Config {
        cgroup,
        bpffs,
        host_network,
        mode,
        attested: identity == Identity::Kernel,
        guard,
        boot_guard,
        boot_notes: Some(PathBuf::from(&flags.state_dir)),
        path,
        selftest_interval: selftest_interval.unwrap_or(SECOND * 60),
        operator_ports: operator_ports(flags),
        log: flags.level == "trace",
    });
    (config, identity)
}

/// `--boot-guard`, which sets the same rules as the agent.
fn boot_guard(flags: &Flags, mistakes: &mut Mistakes) -> Option<PathBuf> {
    let folder = flags.boot_guard.as_ref()?;
    if folder.is_empty() {
        mistakes.add("boot-guard", "it is empty: name the folder where the node's /etc/systemd/system is mounted, or leave the flag out".to_owned());
        return None;
    }
    let enforces = flags.interceptor == "ebpf" && flags.mode == "enforce";
    if !enforces || !flags.guard.iter().any(|part| part == "route") {
        let needs = "it needs --interceptor=ebpf, --mode=enforce and --guard=route: it sets the route guard's rules";
        mistakes.add("boot-guard", needs);
    }
    if flags.detach_on_exit != "false" {
        mistakes
            .add("boot-guard", "it needs rules that outlive the agent: leave --detach-on-exit out");
    }
    mistakes.folder("boot-guard", folder)
}

/// `--path`. A loopback address identifies no pod, so that pod listeners need the kernel's identity.
fn path(
    flags: &Flags,
    identity: Identity,
    mistakes: &mut Mistakes,
) -> Option<intercept::ListenerPath> {
    use intercept::ListenerPath;
    let words = [ListenerPath::Auto, ListenerPath::PodLocal, ListenerPath::Node];
    let words = words.map(|path| (path.name(), path));
    match (mistakes.one_of("path", &flags.path, &words)?, identity) {
        (ListenerPath::PodLocal, Identity::SourceIp) => {
            let why =
                "pod-local needs --interceptor=ebpf and --identity=kernel: every pod has 127.0.0.1";
            mistakes.add("path", why);
            None
        }
        (ListenerPath::PodLocal, _) if flags.mode == "observe" => {
            mistakes
                .add("path", "pod-local needs --mode=enforce: observe redirects no connections");
            None
        }
        (ListenerPath::Auto, Identity::SourceIp) => Some(ListenerPath::Node),
        (path, _) => Some(path),
    }
}

/// The ports of `--admin` and `--metrics`, or 0. Mistakes in them are reported elsewhere.
fn operator_ports(flags: &Flags) -> [u16; 2] {
    let port = |text: &str| text.parse().map_or(0, |address: SocketAddr| address.port());
    [port(&flags.admin), flags.metrics.as_deref().map_or(0, port)]
}

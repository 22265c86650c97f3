//! The configuration of the interception, and the check whether this kernel supports it.

use std::{path::PathBuf, time::Duration};

pub use kiam_common::ListenerPath;
use tracing::warn;

use crate::{
    error::Error,
    guard::GuardConfig,
    sys::{netns::host_netns, rejection::kernel_release},
};

/// The configuration for [`Interception::load`](super::Interception::load).
#[derive(Clone, Debug)]
pub struct Config {
    /// The pods' cgroup; `None`: the only cgroup that matches a kubelet's layout.
    pub cgroup: Option<PathBuf>,
    /// A folder on a BPF file system; pins go to `v<layout>` in it.
    pub bpffs: PathBuf,
    /// Whether hostNetwork pods are intercepted.
    pub host_network: HostNetworkPods,
    /// Whether traffic is changed or only observed.
    pub mode: Mode,
    /// Whether the kernel attests callers (`--identity=kernel`). Then SYNs without a recorded connect are dropped before the
    /// listener, and pods can connect only from network namespaces that are known to be theirs.
    pub attested: bool,
    /// The parts of the guard. `skb` is also on where programs above the pods' cgroup make it necessary.
    pub guard: GuardConfig,
    /// The node's folder of units, for the boot guard, if it is on.
    pub boot_guard: Option<PathBuf>,
    /// The folder where the boot guard notes since when its rules are in place: `--state-dir`.
    pub boot_notes: Option<PathBuf>,
    /// How redirected connections reach the agent.
    pub path: ListenerPath,
    /// The interval of the self-test.
    pub selftest_interval: Duration,
    /// The agent's ports for operators, host order, 0 for none. Pods on the node's network can't bind them.
    pub operator_ports: [u16; 2],
    /// Whether the kernel programs write to the agent's log (at debug level).
    pub log: bool,
}

impl Config {
    /// The programs alone, at `cgroup` and with pins below `bpffs`: no guard, no filter of SYNs.
    #[must_use]
    pub fn new(cgroup: Option<PathBuf>, bpffs: PathBuf) -> Self {
        Self {
            cgroup,
            bpffs,
            host_network: HostNetworkPods::Pass,
            mode: Mode::Enforce,
            attested: false,
            guard: GuardConfig::default(),
            boot_guard: None,
            boot_notes: None,
            path: ListenerPath::Node,
            selftest_interval: Duration::from_secs(60),
            operator_ports: [0; 2],
            log: false,
        }
    }

    /// Whether SYNs are filtered in this mode.
    #[must_use]
    pub fn has_filter(&self) -> bool {
        self.attested && self.mode == Mode::Enforce
    }

    /// Whether the pods' network namespaces need to be known.
    #[must_use]
    pub fn follows_sandboxes(&self) -> bool {
        self.has_pod_listeners() || self.has_filter()
    }

    /// Whether pod listeners are used.
    #[must_use]
    pub fn has_pod_listeners(&self) -> bool {
        self.path != ListenerPath::Node && self.mode == Mode::Enforce
    }

    /// The guard in this mode. `guards_packets`: also the packets' guard, which programs above the pods' cgroup may have made
    /// necessary.
    #[must_use]
    pub fn guard(&self, guards_packets: bool) -> GuardConfig {
        let guard = match self.mode {
            Mode::Enforce => self.guard,
            // Nothing changes for the pods.
            Mode::Observe => GuardConfig::default(),
        };
        GuardConfig { skb: guards_packets, ..guard }
    }

    /// Whether older connections of hostNetwork pods end. Of those that pass, they would hang where packets are `guarded`,
    /// as no connect was recorded: once ended, they are reopened. `first`: no agent has enforced here before.
    #[must_use]
    pub fn ends_host_connections(&self, guarded: bool, first: bool) -> bool {
        self.host_network == HostNetworkPods::Intercept || (guarded && first)
    }
}

/// Whether traffic is changed or only observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Pods' IMDS traffic is redirected or denied.
    Enforce,
    /// IMDS traffic is only counted, by pod.
    Observe,
}

/// Whether pods in the node's own network namespace are intercepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostNetworkPods {
    /// They count as the node, as with iptables: their IMDS traffic is left alone.
    Pass,
    /// They are identified by their cgroup like every other pod.
    Intercept,
}

/// Returns an error where `config` needs a kernel that can distinguish network namespaces, or warns of what differs without
/// it.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    // Other failures are reported when the programs are loaded.
    let has_cookies = host_netns().map_or(true, |cookie| cookie.is_some());
    judge(config, has_cookies, kernel_release())
}

fn judge(config: &Config, has_cookies: bool, release: String) -> Result<(), Error> {
    if has_cookies || config.mode == Mode::Observe {
        return Ok(());
    }
    if config.has_pod_listeners() && config.path == ListenerPath::PodLocal {
        return Err(Error::NoNamespaces { release });
    }
    warn!(
        kernel = release,
        "This kernel can't distinguish network namespaces (5.14 can): all pods use the node listener and are identified by their published addresses"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use kiam_core::telemetry::captured::CapturedLogs;

    use super::*;

    #[test]
    fn the_guard_is_that_of_the_flags_unless_pods_are_only_observed() {
        let guard = GuardConfig { route: Some(100), skb: true, uplink: true };
        let config = |mode| Config { guard, mode, ..Config::new(None, "/sys/fs/bpf/kiam".into()) };
        let (enforces, observes) = (config(Mode::Enforce), config(Mode::Observe));
        assert_eq!(enforces.guard(true), guard);
        assert_eq!(enforces.guard(false), GuardConfig { skb: false, ..guard });
        assert_eq!(observes.guard(false), GuardConfig::default());
    }

    #[test]
    fn connections_of_pods_on_the_nodes_network_end_once_where_they_would_hang() {
        for (host_network, guarded, first, ends) in [
            (HostNetworkPods::Intercept, false, false, true),
            (HostNetworkPods::Pass, true, true, true),
            (HostNetworkPods::Pass, true, false, false),
            (HostNetworkPods::Pass, false, true, false),
        ] {
            let config = Config { host_network, ..Config::new(None, "/sys/fs/bpf/kiam".into()) };
            let given = config.ends_host_connections(guarded, first);
            assert_eq!(given, ends, "{host_network:?} {guarded} {first}");
        }
    }

    #[test]
    fn a_kernel_that_tells_no_namespaces_is_warned_of_once_and_pod_local_is_refused() {
        let config = |path, mode| Config {
            path,
            mode,
            attested: true,
            ..Config::new(None, "/sys/fs/bpf/kiam".into())
        };
        let cases = [
            (ListenerPath::Auto, Mode::Enforce, true, 1),
            (ListenerPath::Node, Mode::Enforce, true, 1),
            (ListenerPath::PodLocal, Mode::Enforce, false, 0),
            (ListenerPath::PodLocal, Mode::Observe, true, 0),
        ];
        for (path, mode, starts, warnings) in cases {
            let logged = CapturedLogs::start(tracing::Level::WARN);
            let config = config(path, mode);
            let judged = judge(&config, false, "5.10.0-46-cloud-amd64".to_owned());
            assert_eq!(judged.is_ok(), starts, "{path:?}");
            let lines = logged.lines_with("identified by their published addresses");
            assert_eq!(lines.len(), warnings, "{lines:?}");
            if let Err(error) = judged {
                let text = error.to_string();
                assert!(text.contains("5.10.0-46") && text.contains("--path=auto"), "{text}");
            }
            assert!(judge(&config, true, String::new()).is_ok());
            assert_eq!(logged.lines_with("").len(), warnings, "a newer kernel is not warned of");
        }
    }
}

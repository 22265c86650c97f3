//! What the interception is configured with, and whether this kernel can have it.

use std::{path::PathBuf, time::Duration};

use tracing::warn;

use crate::{
    error::Error,
    guard::GuardConfig,
    sys::{netns::host_netns, rejection::kernel_release},
};

/// What [`Interception::load`] is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The pods' cgroup; `None`: the only match of the layouts that kubelets make.
    pub cgroup: Option<PathBuf>,
    /// A folder on a BPF file system; pins go to `v<layout>` in it.
    pub bpffs: PathBuf,
    /// What becomes of hostNetwork pods.
    pub host_network: HostNetworkPods,
    /// Whether anything is changed at all.
    pub mode: Mode,
    /// Whether the kernel attests who connects (`--identity=kernel`). Then SYNs that no recorded connect has sent are
    /// dropped before the listener, and pods connect only from network namespaces that are known to be theirs.
    pub attested: bool,
    /// What keeps out what no hook at connect sees. `skb` is also on wherever programs above the pods' cgroup make
    /// it necessary.
    pub guard: GuardConfig,
    /// The node's folder of units, where a unit sets the route guard's rules at boot, if one is to.
    pub boot_guard: Option<PathBuf>,
    /// How redirected connections reach the agent.
    pub path: ListenerPath,
    /// How often the agent tests itself.
    pub selftest_interval: Duration,
    /// The agent's ports for operators, host order, 0 for none: pods on the node's network can't bind them.
    pub operator_ports: [u16; 2],
    /// Whether the kernel programs write to the agent's log (at debug level).
    pub log: bool,
}

impl Config {
    /// Programs alone at `cgroup`, with pins below `bpffs`: no guard, no filter of SYNs.
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

    /// Whether it is of use to know the pods' network namespaces.
    #[must_use]
    pub fn follows_sandboxes(&self) -> bool {
        self.listens_inside() || self.has_filter()
    }

    /// Whether listeners inside pods are of use.
    #[must_use]
    pub fn listens_inside(&self) -> bool {
        self.path != ListenerPath::Node && self.mode == Mode::Enforce
    }
}

/// Whether anything is changed at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Pods' IMDS traffic is redirected or denied.
    Enforce,
    /// It is only counted, by who sends it.
    Observe,
}

/// How redirected connections reach the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerPath {
    /// By a listener inside the pod's network namespace where there is one, else as [`ListenerPath::Node`].
    Auto,
    /// By a listener inside the pod's network namespace; without one they are denied. hostNetwork pods, whose
    /// namespace is the node's, go there.
    PodLocal,
    /// By the listener at the node's address.
    Node,
}

/// What becomes of pods in the node's own network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostNetworkPods {
    /// They are the node, as with iptables: their IMDS traffic is left alone.
    Pass,
    /// They are identified by their cgroup like every other pod.
    Intercept,
}

/// Ends the start where `config` can't be had on a kernel that does not tell network namespaces apart, and warns of what the
/// agent does there instead.
pub(crate) fn check(config: &Config) -> Result<(), Error> {
    // Another failure is the load's to report.
    let told = host_netns().map_or(true, |cookie| cookie.is_some());
    judge(config, told, kernel_release())
}

fn judge(config: &Config, told: bool, release: String) -> Result<(), Error> {
    if told || config.mode == Mode::Observe {
        return Ok(());
    }
    if config.listens_inside() && config.path == ListenerPath::PodLocal {
        return Err(Error::NoNamespaces { release });
    }
    warn!(
        kernel = release,
        "This kernel does not tell network namespaces apart (5.14 does): all pods use the node's listener and are known by their published addresses"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use kiam_core::telemetry::captured::CapturedLogs;

    use super::*;

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
            let lines = logged.lines_with("known by their published addresses");
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

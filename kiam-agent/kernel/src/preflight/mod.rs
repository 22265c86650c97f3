//! What `kiam-agent preflight` asks of Linux.
//!
//! The one rule: the node stays as it is. A check tries whatever leaves nothing behind, such as a program that nothing
//! pins, and otherwise reads.

mod cgroups;
mod files;
mod hooks;
mod kernel;
mod kube_proxy;
mod limits;
mod lsm;
mod nftables;
mod ports;
mod privileges;
mod redirects;
mod routing;
mod seccomp;
mod xtables;

use std::{ffi::OsStr, net::SocketAddr, path::PathBuf, time::Duration};

use kiam_common::redirect::Target;

use crate::{
    intercept::{self, Mode},
    selftest::CGROUP_PREFIX,
    sys::{Cgroup, Walk},
};
use kiam_core::{
    blocking::Blocking,
    preflight::{Check, Topic},
};

/// The longest count of pods.
const COUNT_TIME: Duration = Duration::from_secs(2);

/// What is to be checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The interception; `None` with `--interceptor=off`.
    pub intercept: Option<intercept::Config>,
    /// `--bpffs`.
    pub bpffs: PathBuf,
    /// `--state-dir`.
    pub state_dir: PathBuf,
    /// The addresses that the agent is to listen at, with their flags.
    pub addresses: Vec<(&'static str, SocketAddr)>,
    /// Whether an agent serves here already, which hands its sockets over.
    pub is_served: bool,
}

/// Checks that are made one after the other, beside those of other groups.
pub struct Group {
    /// All that the group may report.
    pub topics: &'static [Topic],
    /// Makes the checks that the configuration needs.
    pub run: fn(&Blocking, &Config) -> Vec<Check>,
}

/// All groups.
pub const GROUPS: &[Group] = &[
    Group {
        topics: &[
            Topic::Capabilities,
            Topic::Seccomp,
            Topic::Apparmor,
            Topic::Selinux,
            Topic::Lockdown,
            Topic::Realtime,
        ],
        run: |_, node| privileges::checks(node),
    },
    Group { topics: &[Topic::Kernel, Topic::Programs], run: |_, node| kernel::checks(node) },
    Group {
        topics: &[Topic::Cgroup, Topic::Hooks, Topic::Processes, Topic::Inotify],
        run: cgroups::checks,
    },
    Group {
        topics: &[Topic::Bpffs, Topic::StateDir, Topic::BootGuard],
        run: |_, node| files::checks(node),
    },
    Group { topics: &[Topic::Ports, Topic::EphemeralPorts], run: |_, node| ports::checks(node) },
    Group {
        topics: &[Topic::RoutingRules, Topic::RouteGuard, Topic::Uplink],
        run: routing::checks,
    },
    Group { topics: &[Topic::Redirects, Topic::KubeProxy], run: |_, node| redirects::checks(node) },
];

// === impl Config ===

impl Config {
    /// The interception, if it changes traffic.
    fn enforcing(&self) -> Option<&intercept::Config> {
        self.intercept.as_ref().filter(|config| config.mode == Mode::Enforce)
    }

    /// The listeners of the agent that is to run.
    fn target(&self) -> Target {
        let hosts = self.addresses.iter().filter(|(flag, _)| *flag == "--host");
        Target::node_listeners(hosts.map(|(_, address)| *address))
    }

    /// Whether an agent's hooks see what this process connects to: it runs in a pod that no agent knows as its own yet.
    fn is_hooked(&self, cgroup: &Cgroup) -> bool {
        intercept::is_installed(&self.bpffs) && cgroup.own_pod().is_some()
    }

    /// Whether an agent's hooks redirect this process on the node's network.
    #[must_use]
    pub fn may_be_intercepted(&self, blocking: &Blocking) -> bool {
        let Some(config) = &self.intercept else { return false };
        config.host_network == intercept::HostNetworkPods::Intercept
            && Cgroup::open(blocking, config.cgroup.as_deref())
                .is_ok_and(|cgroup| self.is_hooked(&cgroup))
    }
}

/// The number of pods' cgroups, without those of self-tests; `None` if the pods' cgroup is not known.
#[must_use]
pub fn count_pods(blocking: &Blocking, config: &Config) -> Option<usize> {
    let intercept = config.intercept.as_ref()?;
    let cgroup = Cgroup::open(blocking, intercept.cgroup.as_deref()).ok()?;
    let pods = Walk::new(blocking, COUNT_TIME).pods(cgroup.path());
    let own = |pod: &&PathBuf| {
        let name = pod.file_name().map(OsStr::as_encoded_bytes).unwrap_or_default();
        name.starts_with(CGROUP_PREFIX.as_bytes())
    };
    Some(pods.len() - pods.iter().filter(own).count())
}

/// The number of things that are called `noun`.
fn counted(number: usize, noun: &str) -> String {
    let end = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{end}")
}

/// `things` with commas between, of which `most` are named.
fn listed(things: &[String], most: usize) -> String {
    let named = things.iter().take(most).cloned().collect::<Vec<_>>().join(", ");
    match things.len().saturating_sub(most) {
        0 => named,
        rest => format!("{named} and {rest} more"),
    }
}

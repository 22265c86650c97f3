//! What a pod's spec says about its containers beyond their commands, and the cgroup that its kubelet makes for it.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use xtask::command::printed;

use super::messages::{
    IdMapping, Mount, MountPropagation, NamespaceMode, NamespaceOption, UserNamespace,
};
use crate::{Cgroup, Layout, node::Node, pod::PodSpec};

/// The first of the node's users that a user namespace has, and their number: what the kubelet takes for its first pod.
const USERS: (u32, u32) = (65_536, 65_536);

/// Who makes cgroups: the kubelet's `cgroupDriver`, and the runtime's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The kubelet and the runtime themselves.
    #[default]
    Cgroupfs,
    /// systemd, which they ask for slices and scopes.
    Systemd,
}

/// Which processes the containers see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Processes {
    /// Each its own.
    #[default]
    Container,
    /// `shareProcessNamespace`.
    Pod,
    /// `hostPID`.
    Node,
}

/// What the containers share, and with whom; the default is what a spec that says nothing gets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// Which processes they see.
    pub processes: Processes,
    /// `hostUsers: false`.
    pub user_namespace: bool,
    /// `securityContext.privileged`.
    pub privileged: bool,
}

/// A file or folder of the node in a container.
#[derive(Clone, Debug)]
pub struct Bind {
    /// Its place on the node.
    pub node: String,
    /// Its place in the container.
    pub container: String,
    /// Whether what the node mounts there later is mounted in the container too.
    pub follows: bool,
}

// === impl Shape ===

impl Shape {
    pub(super) fn namespaces(self, host_network: bool) -> NamespaceOption {
        let network = if host_network { NamespaceMode::Node } else { NamespaceMode::Pod };
        let pid = match self.processes {
            Processes::Container => NamespaceMode::Container,
            Processes::Pod => NamespaceMode::Pod,
            Processes::Node => NamespaceMode::Node,
        };
        let (host_id, length) = USERS;
        let users = || vec![IdMapping { host_id, container_id: 0, length }];
        let userns_options = self.user_namespace.then(|| UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: users(),
            gids: users(),
        });
        NamespaceOption {
            network: network.into(),
            pid: pid.into(),
            ipc: NamespaceMode::Pod.into(),
            userns_options,
        }
    }
}

// === impl Bind ===

impl Bind {
    /// The same place on the node and in the container.
    #[must_use]
    pub fn same(path: &str) -> Self {
        Self { node: path.to_owned(), container: path.to_owned(), follows: false }
    }

    pub(super) fn mount(&self) -> Mount {
        let propagation = match self.follows {
            true => MountPropagation::HostToContainer,
            false => MountPropagation::Private,
        };
        Mount {
            container_path: self.container.clone(),
            host_path: self.node.clone(),
            propagation: propagation.into(),
        }
    }
}

// === impl CgroupDriver ===

impl CgroupDriver {
    /// Makes the pod's cgroup, and returns how the runtime's configuration names it. `Cgroupfs` knows pods of QoS class
    /// burstable alone.
    pub(super) fn create(self, node: &Node, spec: &PodSpec, uid: &str) -> Result<(Cgroup, String)> {
        // As the runtime sees it: the node's cgroup is its root.
        let kubepods = node.kubepods().strip_prefix(node.root_cgroup());
        let kubepods = Path::new("/").join(kubepods.context("the pods' cgroup is the node's")?);
        let seen = |below: &Path| kubepods.join(below).display().to_string();
        match self {
            Self::Cgroupfs => {
                let below = Layout::CgroupfsBurstable.container(uid, "");
                let cgroup = Cgroup::create(node.kubepods().join(&below))?;
                Ok((cgroup, seen(&below)))
            }
            Self::Systemd => {
                let container = spec.layout.container(uid, "");
                let below = container.parent().map(PathBuf::from);
                let below = below.context("a container's cgroup is below its pod's")?;
                let cgroup = Cgroup::of_others(node.kubepods().join(&below));
                slice("start", &cgroup)?;
                Ok((cgroup, seen(&below)))
            }
        }
    }

    /// Takes away what Drop does not.
    pub(super) fn remove(self, cgroup: &Cgroup) -> Result<()> {
        match self {
            Self::Cgroupfs => Ok(()),
            Self::Systemd => slice("stop", cgroup),
        }
    }
}

fn slice(verb: &str, cgroup: &Cgroup) -> Result<()> {
    let name = cgroup.path().file_name().context("a slice has a name")?;
    printed(Command::new("systemctl").arg(verb).arg(name)).map(drop)
}

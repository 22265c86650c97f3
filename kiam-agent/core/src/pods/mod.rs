//! The records of this node's pods, and which pod is calling.
//!
//! One writer, [`PodIndex`], is fed by the Kubernetes watch; all others read by a [`PodReader`]. The one rule: where it
//! is not certain which pod is calling, the answer is [`NotFound`] and never a guess.

pub mod annotations;
mod changes;
#[cfg(any(test, feature = "testing"))]
pub mod fixtures;
mod index;
mod kind;
mod node_pods;
mod opener;
mod reader;
mod records;
mod tables;
mod uid;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::role::{AccountName, QuotedText};

pub use self::{
    changes::{Changed, Position},
    index::PodIndex,
    kind::Record,
    node_pods::NodePods,
    opener::{CallingProcess, Comm, ContainerId, Executable, Inspection, Opener, Relative},
    reader::{NotFound, PodReader},
    uid::{InvalidPodUid, PodUid, is_qos_class},
};

/// The namespace of static pods' mirror pods, by convention.
pub const STATIC_POD_NAMESPACE: &str = "kube-system";

/// One pod as the Kubernetes API describes it, reduced to the fields that decide about credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// `metadata.uid`.
    pub uid: PodUid,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.resourceVersion`, when it is a number; newer records replace older ones. `None` in what readers get.
    pub resource_version: Option<u64>,
    /// `spec.nodeName`: set once the pod is scheduled.
    pub node: Option<String>,
    /// `status.hostIP`.
    pub host_ip: Option<IpAddr>,
    /// `status.podIPs`; empty until the kubelet publishes them.
    pub addresses: Vec<IpAddr>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.serviceAccountName`; the API server fills in `default`.
    pub service_account: String,
    /// Neither `Succeeded` nor `Failed`.
    pub live: bool,
    /// `metadata.deletionTimestamp` is set: it may run on for its grace period.
    pub terminating: bool,
    /// `kubernetes.io/config.hash` of a mirror pod: the UID that the kubelet gave the static pod.
    pub config_hash: Option<PodUid>,
    /// Kind of the controller that made it, from `metadata.ownerReferences`.
    pub controller: Option<Box<str>>,
    /// `iam.amazonaws.com/role`, as written.
    pub role: Option<Annotation>,
    /// `iam.amazonaws.com/session-name`, as written.
    pub session_name: Option<Annotation>,
    /// `iam.amazonaws.com/external-id`, as written.
    pub external_id: Option<Annotation>,
    /// `iam.amazonaws.com/session-policies`, as written.
    pub session_policies: Option<Annotation>,
}

/// One namespace, reduced to the fields that decide about credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.resourceVersion`, when it is a number; as [`Pod::resource_version`].
    pub resource_version: Option<u64>,
    /// `iam.amazonaws.com/permitted`, as written.
    pub permitted: Option<Annotation>,
    /// `iam.amazonaws.com/allowed-roles`, as written.
    pub allowed_roles: Option<Annotation>,
    /// `iam.amazonaws.com/imdsv2`, as written.
    pub imdsv2: Option<Annotation>,
}

/// One ServiceAccount, reduced to the fields that decide about credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// `metadata.namespace` and `metadata.name`.
    pub name: AccountName,
    /// `metadata.resourceVersion`, when it is a number; as [`Pod::resource_version`].
    pub resource_version: Option<u64>,
    /// `eks.amazonaws.com/role-arn`, as written.
    pub role: Option<Annotation>,
}

/// An annotation's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Annotation {
    /// As written.
    Text(Box<str>),
    /// No valid value is this long, so that the text was not kept.
    TooLong(TooLong),
}

/// A value that is too long to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is too long: it has {length} bytes or more, and {most} are read at most")]
pub struct TooLong {
    /// How long it is, if escapes in the API's answer hide nothing.
    pub length: usize,
    /// How long it may be.
    pub most: usize,
}

/// The pod table's configuration: facts that no record has.
#[derive(Clone, Debug)]
pub struct Config {
    /// The namespaces whose mirror pods stand for static pods. Anybody may write a `config.hash` elsewhere.
    pub static_pod_namespaces: Vec<String>,
    /// The node's own addresses, which pods in the host's network connect from.
    pub node: Arc<dyn NodeAddresses>,
}

/// The node's own addresses.
pub trait NodeAddresses: fmt::Debug + Send + Sync {
    /// Whether `address` is one of them now; a v4-mapped one is its IPv4 address.
    fn contains(&self, address: IpAddr) -> bool;
}

/// A node that has no addresses but loopback ones.
#[derive(Clone, Copy, Debug)]
struct LoopbackOnly;

/// The two ends of an accepted connection, as the agent's socket shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The pod's end.
    pub peer: SocketAddr,
    /// The agent's end.
    pub local: SocketAddr,
}

/// The caller of a connection, before the pod is looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// The kernel attests that a process of this pod connected; the address is a cross-check.
    Pod {
        /// From the cgroup path.
        uid: PodUid,
        /// The connection's source address.
        address: IpAddr,
        /// Which network namespace it was opened in.
        origin: Origin,
        /// The process that opened it, for the audit.
        opener: Option<Arc<Opener>>,
    },
    /// The same, at a pod listener: there is no address to check.
    PodListener {
        /// From the cgroup path, and the listener's.
        uid: PodUid,
        /// The process that opened it, for the audit.
        opener: Option<Arc<Opener>>,
    },
    /// Only the source address is known (`--identity=source-ip`).
    Address(IpAddr),
}

/// The network namespace that a connection was opened in. Any user can create namespaces and give them any address, so
/// that an unknown namespace proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The pod's own, as [`PodNamespaces`] knows it.
    Pod,
    /// The node's: only hostNetwork pods connect from there.
    Node,
    /// Not the node's, and otherwise unknown: before kernel 5.14 namespaces can't be told apart. The pod must be known to
    /// have the source address.
    Unknown,
}

/// A network namespace that is known to be a pod's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNamespace {
    /// The UID in the name of the pod's cgroup: for a static pod the config hash.
    pub uid: PodUid,
    /// The namespace's cookie (`SO_NETNS_COOKIE`).
    pub netns: u64,
}

/// The pods' network namespaces.
pub trait PodNamespaces: fmt::Debug + Send + Sync {
    /// The namespaces of `pod`.
    fn of_pod(&self, pod: &Pod) -> Vec<PodNamespace>;

    /// The namespaces of all pods whose addresses are not known yet: the kubelet publishes addresses seconds after a
    /// sandbox runs.
    fn without_address(&self) -> Vec<PodNamespace>;
}

/// Why a connection belongs to no pod. Its requests are rejected with 403.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unattested {
    /// The kernel has no entry: somebody connected to the agent's port directly.
    #[error("the kernel has no entry for this connection")]
    NoEntry,
    /// The process's cgroup is below no pod.
    #[error("cgroup {0} is not a pod's")]
    NotAPod(QuotedText),
    /// The cgroup is gone already.
    #[error("cgroup id {0} is gone")]
    Gone(u64),
    /// The kernel attests the connection, but its pod was not certain in time. Its requests are rejected, except those
    /// for a session token, which reveals nothing.
    #[error("{not_found}")]
    Unknown {
        /// The caller that the kernel attests.
        client: Client,
        /// Why the pod is not certain.
        not_found: NotFound,
    },
    /// A process of one pod connected to the pod listener of another.
    #[error("a process of pod {caller} connected to the pod listener of {listener}")]
    OtherPod {
        /// The process's pod.
        caller: PodUid,
        /// The listener's pod.
        listener: PodUid,
    },
    /// Several pods may have opened the connection, and nothing shows which.
    #[error("{0} pods' network namespaces have this connection")]
    Contested(usize),
    /// The agent's own self-test opened the connection.
    #[error("the connection is the agent's own self-test")]
    Selftest,
    /// The kernel's map can't be read.
    #[error("the identity map can't be read: {0}")]
    Unreadable(String),
}

// === impl Pod ===

impl Pod {
    /// A live pod of the ServiceAccount `default`, without addresses and annotations.
    #[must_use]
    pub fn new(uid: PodUid, namespace: &str, name: &str) -> Self {
        Self {
            uid,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            resource_version: None,
            node: None,
            host_ip: None,
            addresses: Vec::new(),
            host_network: false,
            service_account: "default".to_owned(),
            live: true,
            terminating: false,
            config_hash: None,
            controller: None,
            role: None,
            session_name: None,
            external_id: None,
            session_policies: None,
        }
    }

    /// The pod's ServiceAccount.
    #[must_use]
    pub fn account(&self) -> AccountName {
        AccountName::new(&self.namespace, &self.service_account)
    }

    /// Whether a controller replaces the pod when it is evicted, if need be on another node. Static pods and pods of a
    /// DaemonSet belong to their node. Controllers that are not Kubernetes' own may not replace it: a workflow or a pipeline
    /// fails with its pod.
    #[must_use]
    pub fn comes_back(&self) -> bool {
        const REPLACING: [&str; 4] = ["ReplicaSet", "ReplicationController", "StatefulSet", "Job"];
        let controller = self.controller.as_deref();
        controller.is_some_and(|kind| REPLACING.contains(&kind)) && self.config_hash.is_none()
    }
}

// === impl Annotation ===

impl Annotation {
    /// The value as written.
    ///
    /// # Errors
    ///
    /// [`TooLong`] when the value was not kept.
    pub fn text(&self) -> Result<&str, TooLong> {
        match self {
            Self::Text(text) => Ok(text),
            Self::TooLong(too_long) => Err(*too_long),
        }
    }
}

impl From<&str> for Annotation {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

/// The value for people: quoted, and cut to a line.
impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => QuotedText::new(text).fmt(f),
            Self::TooLong(too_long) => too_long.fmt(f),
        }
    }
}

// === impl Namespace ===

impl Namespace {
    /// A namespace without annotations.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            resource_version: None,
            permitted: None,
            allowed_roles: None,
            imdsv2: None,
        }
    }

    /// Whether the namespace's pods need session tokens. Any value but `optional` requires them, so that a typo fails
    /// closed.
    #[must_use]
    pub fn requires_imdsv2(&self) -> bool {
        self.imdsv2_word().is_none_or(|word| !["", "optional"].contains(&word))
    }

    /// Whether the annotation about session tokens, if any, has a known value.
    #[must_use]
    pub fn imdsv2_is_understood(&self) -> bool {
        self.imdsv2_word().is_some_and(|word| ["", "optional", "required"].contains(&word))
    }

    /// The annotation's value; `None` if it is too long for one.
    fn imdsv2_word(&self) -> Option<&str> {
        self.imdsv2.as_ref().map_or(Some(""), |word| word.text().ok().map(str::trim))
    }
}

// === impl Config ===

impl Default for Config {
    fn default() -> Self {
        Self {
            static_pod_namespaces: vec![STATIC_POD_NAMESPACE.to_owned()],
            node: Arc::new(LoopbackOnly),
        }
    }
}

// === impl LoopbackOnly ===

impl NodeAddresses for LoopbackOnly {
    fn contains(&self, address: IpAddr) -> bool {
        address.to_canonical().is_loopback()
    }
}

/// Resolves the caller of a connection.
pub trait ClientResolver: Send + Sync + 'static {
    /// Resolves `connection`; called once, right after it was accepted.
    ///
    /// # Errors
    ///
    /// [`Unattested`] when the connection belongs to no pod.
    fn resolve(&self, connection: &Connection) -> Result<Client, Unattested>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pods_of_controllers_that_replace_them_elsewhere_come_back() {
        let of = |kind: &str| Pod { controller: Some(kind.into()), ..Pod::test(1) };
        for kind in ["ReplicaSet", "ReplicationController", "StatefulSet", "Job"] {
            assert!(of(kind).comes_back(), "{kind}");
        }
        // Workflows and pipelines fail with their pod.
        for kind in ["", "DaemonSet", "Node", "Workflow", "TaskRun", "Pod"] {
            assert!(!of(kind).comes_back(), "{kind}");
        }
        assert!(!Pod::test(1).comes_back());
    }
}

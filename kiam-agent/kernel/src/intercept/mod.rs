//! Loads, attaches, pins and reads the kernel programs, and guards their back. The only importer of aya and netlink.
//!
//! Everything is pinned below `<bpffs>/v<layout>/`, so that what the kernel does outlives the agent: with
//! no agent, pods' connects to the IMDS are denied. A later agent takes the maps as they are and replaces
//! the programs in place; at no instant are they detached.

mod ancestors;
mod attach;
mod cgroup;
mod defer;
mod flows;
mod guard;
mod hold;
mod in_use;
mod lease;
mod links;
mod loading;
mod marks;
mod membership;
mod metrics;
mod namespaces;
mod netlink;
mod netns;
mod observed;
mod own_pod;
mod pins;
mod programs;
mod proof;
mod reattach;
mod refusal;
mod rewriter;
mod sandbox_table;
mod sock_diag;
mod unfilter;
mod uninstall;
mod walk;

use std::{io, path::PathBuf, time::Duration};

pub use self::{
    cgroup::Cgroup,
    defer::defer_accept,
    flows::{FlowEntry, Flows},
    guard::{Guard, GuardConfig, GuardError, Metrics as GuardMetrics, UplinkProgram},
    hold::Losses,
    in_use::{InUse, Turn, Unused, unused},
    lease::{Lease, last_renewed},
    marks::Marks,
    metrics::{RestoredMetrics, Verdicts},
    namespaces::{inside, loopback_is_up},
    netns::{cookie_of, is_elsewhere},
    observed::{Observation, Observed},
    own_pod::{may_hand_over, prepare},
    programs::{Interception, KernelLog, Parts},
    proof::{
        CGROUP_PREFIX as PROOF_CGROUP, Metrics as ProofMetrics, Outlook, Part, Proof, ProofConfig,
        ProofParts, SUBCOMMAND as PROOF_CLIENT, Witness, client as proof_client,
    },
    reattach::Restored,
    refusal::Refusal,
    rewriter::Rewriter,
    sandbox_table::SandboxTable,
    unfilter::unfilter,
    uninstall::{detach, is_installed, uninstall},
    walk::Walk,
};

use kiam_core::telemetry::Chain;

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
    /// How redirected connections reach the agent.
    pub path: Path,
    /// How often the agent proves itself.
    pub proof_interval: Duration,
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
            path: Path::Node,
            proof_interval: Duration::from_secs(60),
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
        self.path != Path::Node && self.mode == Mode::Enforce
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
pub enum Path {
    /// By a listener inside the pod's network namespace where there is one, else as [`Path::Node`].
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

/// Why traffic can't be intercepted. None of it mends itself, where it is not said: the agent gives up with the message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--cgroup` names no directory of a cgroup2 file system.
    #[error(
        "--cgroup {path:?}: {problem}; name an absolute directory on a cgroup2 mount, below which the pods' cgroups are"
    )]
    Cgroup {
        /// As given.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Nothing on this machine looks like the pods' cgroup.
    #[error(
        "found no pods' cgroup (kubepods, kubepods.slice, …-kubepods.slice) on a cgroup2 mount{hint}; pods need cgroup v2, which systemd.unified_cgroup_hierarchy=1 on the kernel's command line gives to a node with systemd; if the kubelet uses another root, name it with --cgroup"
    )]
    NoCgroup {
        /// What was found instead.
        hint: &'static str,
    },
    /// More than one does.
    #[error("found several pods' cgroups with processes, name one with --cgroup: {0:?}")]
    SeveralCgroups(Vec<PathBuf>),
    /// More than one does, and which of them the kubelet uses is not to be seen yet: this mends itself.
    #[error(
        "found several pods' cgroups, and none of them has a process: {0:?}; a pod decides, or --cgroup"
    )]
    UnusedCgroups(Vec<PathBuf>),
    /// The hooks of this kernel would not see some sockets.
    #[error(
        "kernel {release} has cgroup v1's net_cls or net_prio, which hides sockets from cgroup v2's hooks before kernel 5.15: boot with cgroup_no_v1=net_cls,net_prio or a newer kernel"
    )]
    MixedCgroups {
        /// As `uname -r` has it.
        release: String,
    },
    /// Listeners inside pods are of no use on this kernel.
    #[error(
        "--path=pod-local needs kernel 5.14 (SO_NETNS_COOKIE), and this is kernel {release}, which does not tell pods' network namespaces apart: use a newer kernel, or --path=auto, by which pods use the node's listener here and are known by their published addresses"
    )]
    NoNamespaces {
        /// As `uname -r` has it.
        release: String,
    },
    /// `--bpffs` is on another kind of file system.
    #[error(
        "--bpffs {path:?} is not on a BPF file system; mount one: mount -t bpf bpf /sys/fs/bpf"
    )]
    NotBpffs {
        /// As given.
        path: PathBuf,
    },
    /// Pins of a layout that this agent does not know.
    #[error(
        "{path:?} holds pins of layout v{number}, newer than this agent's v{layout}: run that release or a newer one, or take the pins away with `kiam-agent uninstall` first"
    )]
    NewerLayout {
        /// The folder.
        path: PathBuf,
        /// Its layout.
        number: u32,
        /// Ours.
        layout: u32,
    },
    /// A file or folder could not be read or written.
    #[error("{what} {path:?}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A `bpf(2)` call of our own failed.
    #[error("bpf({call}) for {path:?}: {source}")]
    Bpf {
        /// The command.
        call: &'static str,
        /// The pin.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The object or its maps could not be loaded.
    #[error(
        "the kernel programs can't be loaded (root or CAP_BPF and CAP_NET_ADMIN, and kernel 5.10, are needed): {}", Chain(.0)
    )]
    Load(#[from] aya::EbpfError),
    /// The kernel refused to load a program.
    #[error(transparent)]
    Refused(#[from] Box<Refusal>),
    /// A program could not be attached.
    #[error("program {name}: {}", Chain(.source))]
    Program {
        /// Its name.
        name: &'static str,
        /// aya's error.
        #[source]
        source: aya::programs::ProgramError,
    },
    /// A map operation failed.
    #[error("map {name}: {}", Chain(.source))]
    Map {
        /// Its name.
        name: &'static str,
        /// aya's error.
        #[source]
        source: aya::maps::MapError,
    },
    /// A link could not be pinned.
    #[error("pin {path:?}: {}", Chain(.source))]
    Pin {
        /// Where.
        path: PathBuf,
        /// aya's error.
        #[source]
        source: aya::pin::PinError,
    },
    /// The guard's part.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The kernel's log can't be read.
    #[error("the kernel programs' log: {}", Chain(.0))]
    Log(#[from] aya_log::Error),
    /// The object lacks something; it was built from other sources.
    #[error("the kernel object has no {0}: build it again with `cargo xtask build-ebpf`")]
    Missing(&'static str),
}

//! What can go wrong between the agent and the kernel.

use std::{io, path::PathBuf};

use kiam_core::telemetry::Chain;

use crate::{
    guard::{BootGuardError, GuardError},
    sys::{ProgramRejection, features},
};

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
    /// A program at the root of a mount of cgroup2 does not see the agent.
    #[error(
        "the agent is in no cgroup below {path:?}, by which it would learn its network namespace"
    )]
    OtherMount {
        /// The mount's root.
        path: PathBuf,
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
    Refused(#[from] Box<ProgramRejection>),
    /// The kernel does not make a map.
    #[error("kernel {release} makes no map {name}: {source}; {remedy}")]
    RefusedMap {
        /// As `uname -r` has it.
        release: String,
        /// Its name.
        name: String,
        /// What to do.
        remedy: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A program could not be attached.
    #[error("program {name}: {}{}", Chain(.source), features::attach_remedy(.name, .source))]
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
    /// The boot guard's part.
    #[error(transparent)]
    BootGuard(#[from] BootGuardError),
    /// The kernel's log can't be read.
    #[error("the kernel programs' log: {}", Chain(.0))]
    Log(#[from] aya_log::Error),
    /// The object lacks something; it was built from other sources.
    #[error("the kernel object has no {0}: build it again with `cargo xtask build-ebpf`")]
    Missing(&'static str),
}

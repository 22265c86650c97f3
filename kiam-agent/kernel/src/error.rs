//! The errors between the agent and the kernel.

use std::{io, path::PathBuf};

use kiam_core::telemetry::Chain;

use crate::{
    guard::{BootGuardError, GuardError},
    sys::{ProgramRejection, features},
};

/// Why traffic can't be intercepted. Retrying does not help, except where the variant says so: the agent exits with the
/// message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--cgroup` names no directory of a cgroup2 file system.
    #[error(
        "--cgroup {path:?}: {problem}; name an absolute directory on a cgroup2 mount, below which the pods' cgroups are"
    )]
    Cgroup {
        /// The path, as configured.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// No cgroup on this machine looks like the pods' cgroup.
    #[error(
        "found no pods' cgroup (kubepods, kubepods.slice, …-kubepods.slice) on a cgroup2 mount{hint}; pods need cgroup v2, which systemd.unified_cgroup_hierarchy=1 on the kernel's command line gives to a node with systemd; if the kubelet uses another root, name it with --cgroup"
    )]
    NoCgroup {
        /// The nearest match, if any.
        hint: &'static str,
    },
    /// Several cgroups look like the pods' cgroup.
    #[error("found several pods' cgroups with processes, name one with --cgroup: {0:?}")]
    SeveralCgroups(Vec<PathBuf>),
    /// Several cgroups look like the pods' cgroup, and none has a process yet. Retrying helps.
    #[error(
        "found several pods' cgroups, and none of them has a process: {0:?}; name one with --cgroup, or wait for the first pod"
    )]
    UnusedCgroups(Vec<PathBuf>),
    /// The hooks of this kernel would not see some sockets.
    #[error(
        "kernel {release} has cgroup v1's net_cls or net_prio, which hides sockets from cgroup v2's hooks before kernel 5.15: boot with cgroup_no_v1=net_cls,net_prio or a newer kernel"
    )]
    MixedCgroups {
        /// The kernel's release.
        release: String,
    },
    /// Pod listeners do not work on this kernel.
    #[error(
        "--path=pod-local needs kernel 5.14 (SO_NETNS_COOKIE), and this is kernel {release}, which can't distinguish network namespaces: use a newer kernel, or --path=auto, where pods use the node listener and are identified by their published addresses"
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
    /// There are pins of a newer layout.
    #[error(
        "{path:?} holds pins of layout v{number}, newer than this agent's v{layout}: run that release or a newer one, or remove the pins with `kiam-agent uninstall` first"
    )]
    NewerLayout {
        /// The folder.
        path: PathBuf,
        /// Its layout.
        number: u32,
        /// The agent's layout.
        layout: u32,
    },
    /// A file or folder could not be read or written.
    #[error("{what} {path:?}: {source}")]
    File {
        /// The action that failed.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A direct `bpf(2)` call failed.
    #[error("bpf({call}) for {path:?}: {source}")]
    Bpf {
        /// The command.
        call: &'static str,
        /// The pin.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The object or its maps could not be loaded.
    #[error(
        "the kernel programs can't be loaded (root or CAP_BPF and CAP_NET_ADMIN, and kernel 5.10, are needed): {}", Chain(.0)
    )]
    Load(#[from] aya::EbpfError),
    /// The kernel rejected a program.
    #[error(transparent)]
    Refused(#[from] Box<ProgramRejection>),
    /// The kernel rejected a map.
    #[error("kernel {release} can't create map {name}: {source}; {remedy}")]
    RefusedMap {
        /// The kernel's release.
        release: String,
        /// The map's name.
        name: String,
        /// What to do.
        remedy: String,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// A program can't be attached.
    #[error("program {name}: {}{}", Chain(.source), features::attach_remedy(.name, .source))]
    Program {
        /// The program's name.
        name: &'static str,
        /// aya's error.
        #[source]
        source: aya::programs::ProgramError,
    },
    /// A map operation failed.
    #[error("map {name}: {}", Chain(.source))]
    Map {
        /// The map's name.
        name: &'static str,
        /// aya's error.
        #[source]
        source: aya::maps::MapError,
    },
    /// A link could not be pinned.
    #[error("pin {path:?}: {}", Chain(.source))]
    Pin {
        /// The pin's path.
        path: PathBuf,
        /// aya's error.
        #[source]
        source: aya::pin::PinError,
    },
    /// The guard failed.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The boot guard failed.
    #[error(transparent)]
    BootGuard(#[from] BootGuardError),
    /// The kernel's log can't be read.
    #[error("the kernel programs' log: {}", Chain(.0))]
    Log(#[from] aya_log::Error),
    /// Work on another thread panicked.
    #[error("a part of the agent panicked")]
    Panicked,
    /// The agent was built for the demo without root, which intercepts nothing.
    #[error(
        "this agent was built without the kernel object, and can only run with --interceptor=off: build it with `cargo xtask build-ebpf` and `cargo build -p kiam-agent`"
    )]
    NoObject,
    /// The kernel object lacks a map or a program: it was built from other sources.
    #[error("the kernel object has no {0}: build it again with `cargo xtask build-ebpf`")]
    Missing(&'static str),
}

//! The process that opened a connection, and its container, for the audit. They decide nothing: a process names itself.

use std::{
    fmt,
    ops::RangeInclusive,
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::{Client, PodUid, uid};

/// The length of a container's id. containerd, CRI-O and Docker use 64 hexadecimal digits.
const ID: RangeInclusive<usize> = 32..=64;
/// The most bytes of a cgroup's name that are kept.
const MAX_NAME: usize = 128;

/// The opener of a connection, as the kernel recorded it at connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opener {
    /// The cookie of its socket, which no other socket has until the node boots again.
    pub socket: u64,
    /// The container, by the name of its cgroup.
    pub container: Option<ContainerId>,
    /// The process, if the kernel recorded it.
    pub process: Option<CallingProcess>,
    /// What `/proc` said of the process, once it was read.
    pub inspection: OnceLock<Inspection>,
}

/// The process that called connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallingProcess {
    /// Its number in the initial PID namespace.
    pub pid: u32,
    /// The number of the thread that called.
    pub thread: u32,
    /// The time of the call since the node booted.
    pub connected: Duration,
    /// The thread's name at that time.
    pub comm: Comm,
}

/// What is known of a process that connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Its program.
    pub executable: Executable,
    /// The process that started it, or that it was left to.
    pub parent: Option<Relative>,
}

/// The program of a process that connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executable {
    /// The path, in the container.
    Running(Vec<u8>),
    /// The path, of a process whose thread has another name than at connect: it may run another program since.
    Changed(Vec<u8>),
    /// The process has ended.
    Gone,
    /// The agent may not read it, or does not see processes by the kernel's numbers.
    Unreadable,
}

/// Another process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relative {
    /// Its number in the initial PID namespace.
    pub pid: u32,
    /// Its name.
    pub comm: Vec<u8>,
    /// The path of its program, where it can be read.
    pub executable: Option<Vec<u8>>,
    /// Whether it is the first process of its PID namespace.
    pub is_first: bool,
}

/// A thread's name (`comm`), as the kernel has it: any bytes, which the process may choose.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Comm([u8; 16]);

/// A container's id. Of a cgroup that is not named as runtimes do, the name, escaped and short.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ContainerId(Arc<str>);

// === impl Client ===

impl Client {
    /// The pod's UID that the kernel attests.
    #[must_use]
    pub fn uid(&self) -> Option<&PodUid> {
        match self {
            Self::Pod { uid, .. } | Self::PodListener { uid, .. } => Some(uid),
            Self::Address(_) => None,
        }
    }

    /// The process that opened the connection, if the kernel attests it.
    #[must_use]
    pub fn opener(&self) -> Option<&Arc<Opener>> {
        match self {
            Self::Pod { opener, .. } | Self::PodListener { opener, .. } => opener.as_ref(),
            Self::Address(_) => None,
        }
    }
}

// === impl Comm ===

impl Comm {
    /// The name in the kernel's form, which ends at the first zero.
    #[must_use]
    pub fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes of the name.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().escape_ascii().fmt(f)
    }
}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

// === impl ContainerId ===

impl ContainerId {
    /// The container of a cgroup path below the pods' cgroup: what is directly below the pod's. Only the runtime makes cgroups
    /// there. Deeper ones are the container's own, and prove nothing.
    #[must_use]
    pub fn from_cgroup_path(below: &Path) -> Option<Self> {
        let mut names = below.iter();
        let first = names.next()?;
        if first.to_str().is_some_and(uid::is_qos_class) {
            names.next()?;
        }
        let name = names.next()?.as_encoded_bytes();
        // `<runtime>-<id>.scope` of the systemd driver, else the id alone.
        let id = name.strip_suffix(b".scope").and_then(|scope| scope.rsplit(|b| *b == b'-').next());
        let id = id.unwrap_or(name);
        let is_id = ID.contains(&id.len()) && id.iter().all(u8::is_ascii_hexdigit);
        let mut shown = if is_id { id } else { name }.escape_ascii().to_string();
        shown.truncate(MAX_NAME);
        Some(Self(shown.into()))
    }
}

impl AsRef<str> for ContainerId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_named_by_the_id_that_the_runtime_gave() {
        let pod = "pod0f8fad5b-d9cb-469f-a165-70867728950e";
        let slice = "kubepods-burstable-pod0f8fad5b_d9cb_469f_a165_70867728950e.slice";
        let id = "0123456789abcdef".repeat(4);
        let long = "x".repeat(1000);
        let cut = "x".repeat(MAX_NAME);
        let other = "f".repeat(64);
        let cases = [
            (format!("burstable/{pod}/{id}"), Some(&*id)),
            (format!("{pod}/{id}"), Some(&*id)),
            (format!("kubepods-burstable.slice/{slice}/cri-containerd-{id}.scope"), Some(&id)),
            (format!("{slice}/crio-{id}.scope"), Some(&id)),
            (format!("{slice}/docker-{id}.scope/init"), Some(&id)),
            // What the container made itself is not its name.
            (format!("{pod}/{id}/{other}"), Some(&id)),
            (format!("{pod}/crio-{id}.scope/cri-containerd-{other}.scope"), Some(&id)),
            (format!("{pod}/evil\u{1b}[2J\n\"}}{{"), Some(r#"evil\x1b[2J\n\"}{"#)),
            (format!("{pod}/cri-containerd-12.scope"), Some("cri-containerd-12.scope")),
            (format!("{pod}/{long}"), Some(&cut)),
            (pod.to_owned(), None),
            (format!("burstable/{pod}"), None),
            (String::new(), None),
        ];
        for (path, expected) in cases {
            let found = ContainerId::from_cgroup_path(Path::new(&path));
            assert_eq!(found.as_ref().map(AsRef::as_ref), expected, "{path:?}");
        }
    }

    #[test]
    fn names_of_threads_end_at_the_first_zero_and_are_escaped() {
        let comm = |text: &[u8]| {
            let mut bytes = [0; 16];
            bytes[..text.len()].copy_from_slice(text);
            Comm::new(bytes).to_string()
        };
        assert_eq!(comm(b"aws"), "aws");
        assert_eq!(comm(b"sh\0aws"), "sh");
        assert_eq!(comm(b"\x1b[2J\n\"}\xff"), r#"\x1b[2J\n\"}\xff"#);
        assert_eq!(comm(&[b'a'; 16]), "a".repeat(16));
    }
}

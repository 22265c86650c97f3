//! Finds the cgroup of a process by `/proc/<pid>/cgroup`.
//!
//! That file has a path relative to the root of the *reader's* cgroup namespace, which may be the container's own cgroup.
//! So this root must be found first.

use std::{
    fs, io,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
};

use netlink_packet_sock_diag::{AF_INET, SockDiagMessage, inet::StateFlags};

use super::{
    cgroup::mounts, netlink::Netlink, sock_diag::cgroup_id, sock_diag::tcp_sockets, walk::Walk,
};
use crate::sys::Cgroup;
use kiam_core::pods::is_qos_class;

/// The kernel's number of the node's own cgroup namespace (`PROC_CGROUP_INIT_INO`).
const NODES_NAMESPACE: u64 = 0xEFFF_FFFB;
/// The inode of a cgroup2 hierarchy's root.
const ROOT: u64 = 1;
/// The most containers of a pod, and the most processes of a container, that are searched for the agent itself.
const CONTAINERS: usize = 64;
const PROCESSES: usize = 1024;

/// The owner of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The process runs outside the pods' cgroup.
    Host,
    /// The process runs in the pod with this cgroup.
    Pod(u64),
    /// The owner can't be found.
    Unknown,
}

/// The agent's own cgroup, and the root of its cgroup namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Membership {
    /// The path of the cgroup namespace's root.
    namespace: Option<PathBuf>,
    /// The path of the agent's own cgroup.
    own: Option<PathBuf>,
}

// === impl Membership ===

impl Membership {
    /// Finds this process's cgroups. If the kernel does not show them, the agent searches the pods' containers for itself.
    pub(crate) fn find(walk: &mut Walk<'_>, cgroup: &Cgroup) -> Self {
        let text = text("self");
        if let Some(namespace) = nodes_root(cgroup.path()) {
            let own = text.and_then(|text| resolve(&namespace, &text));
            return Self { namespace: Some(namespace), own };
        }
        let own = own_by_socket(cgroup).ok();
        let own = own.or_else(|| own_by_walk(walk, cgroup.path()));
        let namespace = own.clone().zip(text).and_then(|(own, text)| above(own, &text));
        Self { namespace, own }
    }

    /// The agent's own cgroup, if it is known and at or below `root`.
    pub(crate) fn own(&self, root: &Path) -> Option<&Path> {
        self.own.as_deref().filter(|own| own.starts_with(root))
    }

    /// The owner of the process `pid`, where `root` is the pods' cgroup.
    pub(crate) fn owner(&self, root: &Path, pid: u32) -> Owner {
        let Some(namespace) = &self.namespace else { return Owner::Unknown };
        let path = text(&pid.to_string()).and_then(|text| resolve(namespace, &text));
        let Some(path) = path else { return Owner::Unknown };
        let Ok(below) = path.strip_prefix(root) else { return Owner::Host };
        pod(root, below).map_or(Owner::Unknown, Owner::Pod)
    }
}

/// The id of the pod's cgroup at the kubelet's place in `below`, which is relative to `root`.
pub(crate) fn pod(root: &Path, below: &Path) -> Option<u64> {
    let mut names = below.iter();
    let first = names.next()?;
    let mut pod = root.join(first);
    if first.to_str().is_some_and(is_qos_class) {
        pod.push(names.next()?);
    }
    fs::metadata(pod).ok().map(|metadata| metadata.ino())
}

/// The v2 cgroup of `process` in `/proc`; `None` if the process or its cgroup is gone.
fn text(process: &str) -> Option<String> {
    let all = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let path = all.lines().find_map(|line| line.strip_prefix("0::"))?;
    (path.starts_with('/') && !path.ends_with(" (deleted)")).then(|| path.to_owned())
}

/// The mount of the whole hierarchy of `root`, for a process in the node's cgroup namespace.
fn nodes_root(root: &Path) -> Option<PathBuf> {
    let number = |path: &Path| fs::metadata(path).map(|metadata| metadata.ino());
    if number(Path::new("/proc/self/ns/cgroup")).ok() != Some(NODES_NAMESPACE) {
        return None;
    }
    let whole = |mount: &PathBuf| {
        root.starts_with(mount) && number(mount).is_ok_and(|number| number == ROOT)
    };
    mounts("cgroup2").into_iter().find(whole)
}

/// The cgroup that `text` names, seen from `namespace`.
fn resolve(namespace: &Path, text: &str) -> Option<PathBuf> {
    let mut path = namespace.to_owned();
    for part in Path::new(text).components() {
        match part {
            Component::ParentDir => path.pop().then_some(())?,
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// The root of the namespace from which `own` looks like `text`.
fn above(own: PathBuf, text: &str) -> Option<PathBuf> {
    let below = Path::new(text).strip_prefix("/").ok()?;
    if below.components().any(|part| part == Component::ParentDir) || !own.ends_with(below) {
        return None;
    }
    own.ancestors().nth(below.components().count()).map(Path::to_owned)
}

/// The own cgroup, by the cgroup id of a socket of this process.
fn own_by_socket(cgroup: &Cgroup) -> io::Result<PathBuf> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut question = tcp_sockets(AF_INET, StateFlags::LISTEN);
    let port = listener.local_addr()?.port();
    question.socket_id.source_port = port;
    let mut id = None;
    Netlink::sock_diag()?.each(SockDiagMessage::InetRequest(question), |answer| {
        if let SockDiagMessage::InetResponse(socket) = answer
            && socket.header.socket_id.source_port == port
            && socket.header.socket_id.source_address == Ipv4Addr::LOCALHOST
        {
            id = cgroup_id(&socket);
        }
        Ok(())
    })?;
    let id = id.ok_or(io::ErrorKind::NotFound)?;
    let path = cgroup.path_of(id)?;
    // A cgroup outside the mount of the pods' cgroup has no path.
    match fs::metadata(&path) {
        Ok(metadata) if metadata.ino() == id => Ok(path),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The own cgroup, if it is a container's: `cgroup.procs` shows process numbers of the reader's PID namespace.
fn own_by_walk(walk: &mut Walk<'_>, root: &Path) -> Option<PathBuf> {
    let own = std::process::id().to_string();
    for pod in walk.pods(root) {
        for container in walk.children(&pod, CONTAINERS).unwrap_or_default() {
            if walk.members(&container, PROCESSES).unwrap_or_default().contains(&own) {
                return Some(container);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread};

    use lab::{LabPod, Node, PodSpec};
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;
    use kiam_core::blocking::Blocking;

    #[test]
    fn names_are_resolved_from_the_root_of_the_readers_namespace() {
        let cases = [
            ("/", "/", "/"),
            ("/cg", "/kubepods/pod1/c", "/cg/kubepods/pod1/c"),
            ("/cg/kubepods/pod1/c", "/", "/cg/kubepods/pod1/c"),
            ("/cg/kubepods/pod1/c", "/../../pod2/c", "/cg/kubepods/pod2/c"),
            ("/cg/kubepods/pod1/c", "/../../../system.slice", "/cg/system.slice"),
        ];
        for (namespace, text, expected) in cases {
            assert_eq!(resolve(Path::new(namespace), text), Some(expected.into()), "{text}");
        }
        assert_eq!(resolve(Path::new("/cg"), "/../../.."), None);
        let own = || PathBuf::from("/cg/kubepods/pod1/c");
        assert_eq!(above(own(), "/"), Some(own()));
        assert_eq!(above(own(), "/pod1/c"), Some("/cg/kubepods".into()));
        assert_eq!(above(own(), "/pod2/c"), None);
        assert_eq!(above(own(), "/../c"), None);
    }

    #[test]
    fn a_pod_is_at_the_kubelets_place() {
        let root = tempfile::tempdir().unwrap();
        let number = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            fs::metadata(path).unwrap().ino()
        };
        let (first, second) = (number("pod1"), number("burstable/pod2"));
        let of = |below: &str| pod(root.path(), Path::new(below));
        assert_eq!(of("pod1/c/pod2"), Some(first));
        assert_eq!(of("burstable/pod2/c/x/y"), Some(second));
        for nobody in ["", "burstable", "pod3/c"] {
            assert_eq!(of(nobody), None, "{nobody}");
        }
    }

    /// Whose each process is, and what this thread takes for its own pod, seen from where `enter` leads.
    fn seen(node: &Node, pids: [u32; 3], enter: impl FnOnce() + Send) -> (Option<u64>, [Owner; 3]) {
        let look = || {
            enter();
            let blocking = Blocking::here().unwrap();
            let cgroup = Cgroup::open(&blocking, Some(node.kubepods())).unwrap();
            (cgroup.own_pod(), pids.map(|pid| cgroup.owner(pid)))
        };
        thread::scope(|scope| scope.spawn(look).join().unwrap())
    }

    #[test]
    fn a_process_is_its_pods_whatever_namespace_it_is_seen_from() {
        if lab::skip!() {
            return;
        }
        let node = Node::start().unwrap();
        let pods = ["a", "b"].map(|name| node.pod(PodSpec::new("shop", name)).unwrap());
        let deep = pods[0].cgroup().path().join("x/y/z");
        fs::create_dir_all(&deep).unwrap();
        let run = |pod: &LabPod| pod.command("sleep").unwrap().arg("60").spawn().unwrap();
        let mut processes = [run(&pods[0]), run(&pods[1])];
        fs::write(deep.join("cgroup.procs"), processes[0].id().to_string()).unwrap();
        let mut host = Command::new("sleep").arg("60").spawn().unwrap();
        let pids = [processes[0].id(), processes[1].id(), host.id()];
        let number = |pod: &LabPod| pod.slice().id().unwrap();
        let owners = [Owner::Pod(number(&pods[0])), Owner::Pod(number(&pods[1])), Owner::Host];
        assert_eq!(seen(&node, pids, || {}), (None, owners));
        // SAFETY: NEWCGROUP does not unshare the descriptor table, the one flag that is unsafe.
        let unshare = || unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) }.unwrap();
        assert_eq!(seen(&node, pids, unshare), (None, owners));
        for process in processes.iter_mut().chain([&mut host]) {
            process.kill().unwrap();
            process.wait().unwrap();
        }
        assert!(seen(&node, pids, || {}).1.iter().all(|owner| *owner == Owner::Unknown));
    }
}

//! Finds the pods' network namespaces by the processes in the pods' cgroup, and runs work inside them.

use std::{
    collections::{HashSet, VecDeque},
    fs::{self, File},
    io,
    ops::ControlFlow,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::Path,
    thread,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::walk::Walk;

/// `NS_GET_USERNS` of `linux/nsfs.h`: the user namespace that owns another namespace.
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// The part of one pod that is searched: its own cgroup, its containers', and two levels below, where runtimes may have the
/// processes (as in `sandboxes`). A container may create any number of cgroups, processes and namespaces.
const DEPTH: usize = 3;
const CGROUPS: usize = 64;
const PROCESSES: usize = 1024;
const NAMESPACES: usize = 16;

/// The gaps of a search by [`of_pods`].
#[derive(Debug, Default)]
pub(crate) struct SearchGaps {
    /// Processes that are invisible in the agent's PID namespace.
    pub(crate) hidden: usize,
    /// Pods that were not searched completely.
    pub(crate) pods: usize,
}

/// The rest of a pod's share of the search.
struct Share {
    cgroups: usize,
    processes: usize,
    namespaces: usize,
}

/// Calls `visit` for each network namespace of the pods below `root`, once each, until it breaks. The node's own namespace
/// and that of the self-test are left out. Since pods decide how many namespaces there are, only one is open at a time,
/// and only each pod's share is searched. Processes that end meanwhile are skipped.
pub(crate) fn of_pods(
    walk: &mut Walk<'_>,
    root: &Path,
    mut visit: impl FnMut(&File) -> ControlFlow<()>,
) -> SearchGaps {
    let mut unseen = SearchGaps::default();
    // Inode numbers. A namespace that reuses the number of an ended one is skipped: it is younger than this search.
    let mut known = HashSet::new();
    known.extend(fs::metadata("/proc/self/ns/net").map(|own| own.ino()));
    let pods = walk.pods(root);
    for (searched, pod) in pods.iter().enumerate() {
        if walk.is_over() {
            unseen.pods += pods.len() - searched;
            break;
        }
        match of_pod(walk, pod, &mut known, (&mut unseen.hidden, &mut visit)) {
            ControlFlow::Break(()) => break,
            ControlFlow::Continue(whole) => unseen.pods += usize::from(!whole),
        }
    }
    unseen
}

/// Searches one pod. Returns whether the search was complete.
fn of_pod(
    walk: &mut Walk<'_>,
    pod: &Path,
    known: &mut HashSet<u64>,
    (hidden, visit): (&mut usize, &mut impl FnMut(&File) -> ControlFlow<()>),
) -> ControlFlow<(), bool> {
    let mut share = Share { cgroups: CGROUPS, processes: PROCESSES, namespaces: NAMESPACES };
    let mut cgroups = VecDeque::from([(pod.to_owned(), 0)]);
    let mut whole = true;
    while let Some((cgroup, depth)) = cgroups.pop_front() {
        if share.cgroups == 0 {
            return ControlFlow::Continue(false);
        }
        share.cgroups -= 1;
        let processes = walk.members(&cgroup, share.processes + 1).unwrap_or_default();
        for pid in processes {
            if share.processes == 0 || walk.is_over() {
                return ControlFlow::Continue(false);
            }
            share.processes -= 1;
            // The process has no number in the agent's PID namespace.
            if pid == "0" {
                *hidden += 1;
                continue;
            }
            let Ok(namespace) = File::open(format!("/proc/{pid}/ns/net")) else { continue };
            let is_new = namespace.metadata().is_ok_and(|metadata| known.insert(metadata.ino()));
            if !is_new || is_child(&pid) {
                continue;
            }
            if share.namespaces == 0 {
                return ControlFlow::Continue(false);
            }
            share.namespaces -= 1;
            visit(&namespace)?;
        }
        let children = walk.children(&cgroup, CGROUPS).unwrap_or_default();
        if depth == DEPTH {
            whole &= children.is_empty();
        } else {
            cgroups.extend(children.into_iter().map(|path| (path, depth + 1)));
        }
    }
    ControlFlow::Continue(whole)
}

/// Whether this agent started the process `pid`, which is then the self-test's.
fn is_child(pid: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent.is_some_and(|parent| parent.trim() == std::process::id().to_string())
}

/// Whether the node's user namespace owns this network namespace. One that a process created in a user namespace of its own
/// has routes that the process chose. Kernel 4.9.
pub(crate) fn is_nodes(namespace: &File) -> bool {
    // SAFETY: the request takes no argument, and answers with a descriptor that nobody else owns.
    let owner = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if owner < 0 {
        return false;
    }
    // SAFETY: as above.
    let owner = File::from(unsafe { OwnedFd::from_raw_fd(owner) });
    let own = fs::metadata("/proc/self/ns/user");
    owner.metadata().is_ok_and(|owner| own.is_ok_and(|own| own.ino() == owner.ino()))
}

/// Runs `work` in `namespace`, on a thread of its own: a pool's thread would stay in the namespace.
///
/// # Errors
///
/// The system's, for example without CAP_SYS_ADMIN.
pub fn inside<T: Send>(
    namespace: &File,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let entered = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        };
        let thread =
            thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, entered)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Whether `lo` is up in this thread's network namespace. Addresses can be bound even while it is down.
///
/// # Errors
///
/// The system's.
pub fn loopback_is_up() -> io::Result<bool> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut name = [0; libc::IFNAMSIZ];
    name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: 0 };
    let mut request = libc::ifreq { ifr_name: name, ifr_ifru };
    // SAFETY: the kernel reads the name, which ends with 0, and writes the flags.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the flags were set here, and by the kernel.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(i32::from(flags) & libc::IFF_UP != 0)
}

#[cfg(test)]
mod tests {
    use std::{
        path::PathBuf,
        process::{Child, Command, Stdio},
    };

    use std::time::Duration;

    use super::*;
    use kiam_core::blocking::Blocking;

    const TIME: Duration = Duration::from_secs(60);

    /// A process in a network namespace of its own.
    struct Sandboxed(Child);

    impl Sandboxed {
        fn start() -> Self {
            let mut command = Command::new("unshare");
            // A child of a child: those of this process are no pods'.
            command.args(["--net", "--fork", "--kill-child", "--", "cat"]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().expect("unshare runs");
            // It answers once it is there.
            let (input, output) = (child.stdin.as_mut(), child.stdout.as_mut());
            io::Write::write_all(input.expect("it is piped"), b"!").expect("it reads");
            io::Read::read_exact(output.expect("it is piped"), &mut [0]).expect("it answers");
            Self(child)
        }

        /// Its number in the list that the kernel has of a cgroup's processes.
        fn pid(&self) -> String {
            let unshare = self.0.id();
            let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"));
            children.expect("it runs").trim().to_owned()
        }

        /// What a descriptor of its namespace leads to.
        fn namespace(&self) -> PathBuf {
            fs::read_link(format!("/proc/{}/ns/net", self.pid())).expect("it runs")
        }
    }

    impl Drop for Sandboxed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_own_namespace_is_left_out_and_processes_out_of_sight_are_counted() {
        let cgroup = tempfile::tempdir().unwrap();
        let container = cgroup.path().join("pod1/container");
        fs::create_dir_all(&container).unwrap();
        // The last is above the kernel's largest process id.
        let processes = format!("0\n{}\n0\n99999999\n", std::process::id());
        fs::write(container.join("cgroup.procs"), processes).unwrap();
        let blocking = Blocking::here().unwrap();
        let mut walk = Walk::new(&blocking, TIME);
        let unseen = of_pods(&mut walk, cgroup.path(), |_| unreachable!("it is the node's own"));
        assert_eq!((unseen.hidden, unseen.pods), (2, 0));
    }

    #[test]
    fn namespaces_are_held_one_at_a_time_and_shown_once() {
        if lab::skip!() {
            return;
        }
        let cgroup = tempfile::tempdir().unwrap();
        let sandboxed = [(); 5].map(|()| Sandboxed::start());
        for (number, one) in sandboxed.iter().enumerate() {
            let container = cgroup.path().join(format!("pod{number}/container"));
            fs::create_dir_all(&container).unwrap();
            let pid = one.pid();
            fs::write(container.join("cgroup.procs"), format!("{pid}\n{pid}\n")).unwrap();
        }
        let proof = Sandboxed::start();
        let below = cgroup.path().join("kiam-selftest-1");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("cgroup.procs"), format!("{}\n", proof.0.id())).unwrap();
        let all: HashSet<PathBuf> = sandboxed.iter().map(Sandboxed::namespace).collect();
        let mut shown = HashSet::new();
        let blocking = Blocking::here().unwrap();
        let mut walk = Walk::new(&blocking, TIME);
        of_pods(&mut walk, cgroup.path(), |namespace| {
            let shows = format!("/proc/self/fd/{}", namespace.as_raw_fd());
            assert!(shown.insert(fs::read_link(shows).unwrap()), "once");
            let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
            let open = open.filter_map(|entry| fs::read_link(entry.path()).ok());
            assert_eq!(open.filter(|target| all.contains(target)).count(), 1);
            ControlFlow::Continue(())
        });
        assert_eq!(shown, all);
        let mut count = 0;
        of_pods(&mut walk, cgroup.path(), |_| {
            count += 1;
            ControlFlow::Break(())
        });
        assert_eq!(count, 1);
    }

    #[test]
    fn a_pod_with_any_number_of_cgroups_and_processes_costs_its_share_and_no_other_pod_is_left_out()
    {
        let root = tempfile::tempdir().unwrap();
        let container = root.path().join("burstable/pod1/container");
        for number in 0..2000 {
            fs::create_dir_all(container.join(format!("{number}/below"))).unwrap();
        }
        let deep = root.path().join("burstable/pod2/container/1/2/3");
        fs::create_dir_all(&deep).unwrap();
        let crowd = root.path().join("burstable/pod3");
        fs::create_dir_all(&crowd).unwrap();
        fs::write(crowd.join("cgroup.procs"), "0\n".repeat(PROCESSES + 1)).unwrap();
        let last = root.path().join("pod4/container");
        fs::create_dir_all(&last).unwrap();
        for cgroup in [&deep, &last] {
            fs::write(cgroup.join("cgroup.procs"), "0\n").unwrap();
        }
        let blocking = Blocking::here().unwrap();
        let mut walk = Walk::new(&blocking, TIME);
        let unseen = of_pods(&mut walk, root.path(), |_| unreachable!("nobody is to be seen"));
        // The last pod's one, and the crowd's share; not what is deeper than runtimes put processes.
        assert_eq!(unseen.hidden, PROCESSES + 1);
        assert_eq!(unseen.pods, 3, "all but the last");
        assert!(walk.read() < 2000, "{}", walk.read());
    }

    #[test]
    fn pods_that_there_was_no_time_for_are_counted() {
        let root = tempfile::tempdir().unwrap();
        for pod in ["pod1", "pod2", "pod3"] {
            fs::create_dir_all(root.path().join(pod)).unwrap();
        }
        let blocking = Blocking::here().unwrap();
        // All of it is used up by the list of the pods.
        let mut walk = Walk::of(&blocking, 3);
        assert_eq!(of_pods(&mut walk, root.path(), |_| ControlFlow::Continue(())).pods, 3);
    }
}

//! The pods' network namespaces, found by the processes in the pods' cgroup; and work inside them.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
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

/// `NS_GET_USERNS` of `linux/nsfs.h`: the user namespace that owns another namespace.
const NS_GET_USERNS: libc::Ioctl = 0xb701;

/// What the processes in the pods' cgroup live in.
#[derive(Debug, Default)]
pub(super) struct Namespaces {
    /// Each once; the node's own is not among them.
    pub(super) found: Vec<File>,
    /// Processes that the agent can't see: it is in another PID namespace than they are.
    pub(super) hidden: usize,
}

// === impl Namespaces ===

impl Namespaces {
    /// Those of the processes below `cgroup`. Processes come and go meanwhile; who is gone is left out.
    pub(super) fn of_pods(cgroup: &Path) -> Self {
        let mut namespaces = Self::default();
        // Inode numbers: they are unique among the namespaces that a descriptor keeps alive.
        let mut known = HashSet::new();
        known.extend(fs::metadata("/proc/self/ns/net").map(|own| own.ino()));
        namespaces.search(cgroup, &mut known);
        namespaces
    }

    fn search(&mut self, cgroup: &Path, known: &mut HashSet<u64>) {
        let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines() {
            // The kernel's way to say that the reader's PID namespace has no number for it.
            if pid == "0" {
                self.hidden += 1;
                continue;
            }
            let Ok(namespace) = File::open(format!("/proc/{pid}/ns/net")) else { continue };
            if namespace.metadata().is_ok_and(|metadata| known.insert(metadata.ino())) {
                self.found.push(namespace);
            }
        }
        for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.search(&entry.path(), known);
            }
        }
    }
}

/// Whether the node made this network namespace: one that a process made in a user namespace of its own belongs to
/// that, and its routes are that process's. Kernel 4.9.
pub(super) fn is_nodes(namespace: &File) -> bool {
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

/// Does `work` in `namespace`, on a thread that ends with it: a pool's thread would stay there.
///
/// # Errors
///
/// The system's, without CAP_SYS_ADMIN or threads.
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

/// Whether `lo` is up in this thread's network namespace. Its addresses can be bound when it is down.
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
    use super::*;

    #[test]
    fn the_own_namespace_is_left_out_and_processes_out_of_sight_are_counted() {
        let cgroup = tempfile::tempdir().unwrap();
        let container = cgroup.path().join("pod1/container");
        fs::create_dir_all(&container).unwrap();
        // The last is above the kernel's largest process id.
        let processes = format!("0\n{}\n0\n99999999\n", std::process::id());
        fs::write(container.join("cgroup.procs"), processes).unwrap();
        let namespaces = Namespaces::of_pods(cgroup.path());
        assert_eq!((namespaces.found.len(), namespaces.hidden), (0, 2));
    }
}

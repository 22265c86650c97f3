//! The Unix sockets for operators. Each agent has its own, since there are two agents during a takeover.
//!
//! `admin.<random>.sock` is one process's own, and `admin.sock` is a link to that of the serving agent. `status`, which is
//! the container's probe, must ask the agent of its own container. It finds that agent by the peer's process
//! (`SO_PEERCRED`): a process of another PID namespace has the number 0, and one of another container with hostPID is in
//! another cgroup. On the host, outside of containers, the link decides.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use tokio::net::{UnixListener, UnixStream};

use kiam_core::pods::PodUid;

/// Name of the link in the state folder.
pub const SOCKET: &str = "admin.sock";
/// The kernel's number of the node's own cgroup namespace (`PROC_CGROUP_INIT_INO`).
const NODES_NAMESPACE: u64 = 0xEFFF_FFFB;

/// A process's own socket.
#[derive(Debug)]
pub struct OwnSocket {
    state_dir: PathBuf,
    name: String,
}

/// Binds this process's own socket in `state_dir`, for root alone. Removes the sockets of dead agents.
///
/// # Errors
///
/// The system's.
pub fn bind_unix(state_dir: &Path) -> io::Result<(UnixListener, OwnSocket)> {
    sweep(state_dir);
    let name = format!("admin.{:016x}.sock", fastrand::u64(..));
    // Bound under another name and renamed, so that a socket of this name always listens.
    let draft = state_dir.join(format!(".{name}"));
    let listener = UnixListener::bind(&draft)?;
    // Between bind and this, the folder's own mode (0700) keeps others out.
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))?;
    fs::rename(&draft, state_dir.join(&name))?;
    Ok((listener, OwnSocket { state_dir: state_dir.to_owned(), name }))
}

// === impl OwnSocket ===

impl OwnSocket {
    /// Points the link to this socket, since this agent serves now.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn link(&self) -> io::Result<()> {
        let draft = self.state_dir.join(format!(".{}.link", self.name));
        symlink(&self.name, &draft)?;
        fs::rename(&draft, self.state_dir.join(SOCKET))
    }
}

/// Connects to the agent of this process's own container, or outside of containers to the serving agent.
pub(super) async fn connect(state_dir: &Path) -> io::Result<UnixStream> {
    let serving = UnixStream::connect(state_dir.join(SOCKET)).await;
    let own = cgroups("self");
    let is_own = |pid: u32| own.is_some() && cgroups(&pid.to_string()) == own;
    if serving.as_ref().is_ok_and(|stream| process(stream).is_some_and(is_own)) {
        return serving;
    }
    for path in sockets(state_dir) {
        match UnixStream::connect(path).await {
            Ok(stream) if process(&stream).is_some_and(is_own) => return Ok(stream),
            _ => {}
        }
    }
    let serving = serving?;
    let problem = match is_container() {
        Ok(false) if process(&serving).is_some() => return Ok(serving),
        Ok(_) => {
            "the agents that listen there run in other containers; run this in the agent's own container, or on the node".to_owned()
        }
        Err(error) => format!(
            "can't find out whether this is the node or a container (/proc/1/ns/cgroup: {error}); run this in the agent's own container, or with CAP_SYS_PTRACE"
        ),
    };
    Err(io::Error::new(io::ErrorKind::NotFound, problem))
}

/// Whether an agent serves, in whatever container.
pub async fn is_served(state_dir: &Path) -> bool {
    UnixStream::connect(state_dir.join(SOCKET)).await.is_ok()
}

/// The peer's process, if it is visible in this PID namespace.
fn process(stream: &UnixStream) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}

/// The cgroups of a process in `/proc`: the same text for every process of a container.
fn cgroups(process: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/{process}/cgroup")).ok()
}

/// Whether this process runs in a container.
fn is_container() -> io::Result<bool> {
    let namespace = |process: &str| {
        fs::metadata(format!("/proc/{process}/ns/cgroup")).map(|metadata| metadata.ino())
    };
    is_contained(namespace("self")?, || namespace("1"), cgroups("self").as_deref())
}

/// Whether a process runs in a container: its cgroup is a pod's, or its cgroup namespace is neither the machine's own nor
/// that of the process `first`, which is the node's if the node itself is a container. Reading the latter needs privileges.
fn is_contained(
    own: u64,
    first: impl FnOnce() -> io::Result<u64>,
    cgroups: Option<&str>,
) -> io::Result<bool> {
    let names_pod = |name: &str| PodUid::from_cgroup_name(name).is_some();
    if cgroups.is_some_and(|text| text.split(['/', '\n']).any(names_pod)) {
        return Ok(true);
    }
    Ok(own != NODES_NAMESPACE && first()? != own)
}

fn sweep(state_dir: &Path) {
    for path in sockets(state_dir) {
        let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if std::os::unix::net::UnixStream::connect(&path).is_err_and(refused) {
            // Another starting agent may have been faster.
            let _ = fs::remove_file(&path);
        }
    }
}

/// The agents' own sockets in `state_dir`.
fn sockets(state_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state_dir).into_iter().flatten().flatten();
    let own = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| {
            name != SOCKET && name.starts_with("admin.") && name.ends_with(".sock")
        })
    };
    entries.map(|entry| entry.path()).filter(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_cgroup_namespace_is_no_containers_whoever_is_asked() {
        let pod = "0::/kubepods/pod0f8fad5b-d9cb-469f-a165-70867728950e/c\n";
        let session = "0::/user.slice/session-1.scope\n";
        let cases = [
            (NODES_NAMESPACE, None, session, Some(false)),
            (NODES_NAMESPACE, Some(NODES_NAMESPACE), session, Some(false)),
            (NODES_NAMESPACE, None, pod, Some(true)),
            // In a node that is a container itself, and in a container there.
            (7, Some(7), session, Some(false)),
            (8, Some(7), session, Some(true)),
            (7, None, session, None),
            (7, None, pod, Some(true)),
        ];
        for (own, first, cgroups, expected) in cases {
            let first = || first.ok_or_else(|| io::ErrorKind::PermissionDenied.into());
            let contained = is_contained(own, first, Some(cgroups));
            assert_eq!(contained.ok(), expected, "{own} {cgroups}");
        }
    }

    #[tokio::test]
    async fn link_leads_to_the_one_that_serves_and_what_is_dead_is_swept() {
        let state = tempfile::tempdir().unwrap();
        let bind = || bind_unix(state.path()).unwrap();
        let error = connect(state.path()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        drop(bind());
        let (first, name) = bind();
        name.link().unwrap();
        assert_eq!(sockets(state.path()).len(), 1, "the dead one's is gone");
        let (second, name) = bind();
        assert_eq!(sockets(state.path()).len(), 2);
        let target = fs::canonicalize(state.path().join(SOCKET)).unwrap();
        assert_eq!(fs::metadata(target).unwrap().permissions().mode() & 0o777, 0o600);
        let asked = connect(state.path()).await.unwrap();
        first.accept().await.unwrap();
        drop(asked);
        name.link().unwrap();
        let asked = connect(state.path()).await.unwrap();
        second.accept().await.unwrap();
        drop((asked, second));
        // The one that served died: the one that is left is asked.
        let _asked = connect(state.path()).await.unwrap();
        first.accept().await.unwrap();
    }
}

//! The Unix sockets for operators: each agent has its own, for while one takes over from another there are two.
//!
//! `admin.<random>.sock` is a process's own, and `admin.sock` is a link to that of the agent that serves. `status`, which is the
//! container's probe, must ask the agent of its own container: the kernel shows it the other end's process, as 0
//! when that is of another process namespace (`SO_PEERCRED`), and in a pod that shares the host's processes, whose
//! process is in another cgroup. On the host, outside every container, the link decides.

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

/// Where a process's own socket is.
#[derive(Debug)]
pub struct OwnSocket {
    state_dir: PathBuf,
    name: String,
}

/// Binds a socket of this process's own in `state_dir`, for root alone. Sockets that dead agents left are removed.
///
/// # Errors
///
/// The system's.
pub fn bind_unix(state_dir: &Path) -> io::Result<(UnixListener, OwnSocket)> {
    sweep(state_dir);
    let name = format!("admin.{:016x}.sock", fastrand::u64(..));
    // Made under another name: what has the name listens.
    let draft = state_dir.join(format!(".{name}"));
    let listener = UnixListener::bind(&draft)?;
    // Between bind and this, the folder's own mode (0700) keeps others out.
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))?;
    fs::rename(&draft, state_dir.join(&name))?;
    Ok((listener, OwnSocket { state_dir: state_dir.to_owned(), name }))
}

// === impl OwnSocket ===

impl OwnSocket {
    /// Lets the link lead to it: this is the agent that serves.
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

/// Connects to the agent of this process's own container; outside of containers, to the one that serves.
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
            "the agents that listen there are of other containers; ask in the agent's own container, or on the node".to_owned()
        }
        Err(error) => format!(
            "whether this is the node or another container can't be told (/proc/1/ns/cgroup: {error}); ask in the agent's own container, or with CAP_SYS_PTRACE"
        ),
    };
    Err(io::Error::new(io::ErrorKind::NotFound, problem))
}

/// The other end's process, as far as it can be seen from here.
fn process(stream: &UnixStream) -> Option<u32> {
    let pid = stream.peer_cred().ok()?.pid()?;
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}

/// The cgroups of a process, as `/proc` shows them to this one: the same text for every process of a container.
fn cgroups(process: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/{process}/cgroup")).ok()
}

/// Whether this process is of a container; an error where that can't be told.
fn is_container() -> io::Result<bool> {
    let namespace = |process: &str| {
        fs::metadata(format!("/proc/{process}/ns/cgroup")).map(|metadata| metadata.ino())
    };
    is_contained(namespace("self")?, || namespace("1"), cgroups("self").as_deref())
}

/// Whether a process is of a container: its cgroup is a pod's, or its cgroup namespace is neither the machine's own nor that
/// of `first`, which is the node's when the node itself is a container. Not everybody may see the latter.
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
            // Another agent that starts may have been faster.
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

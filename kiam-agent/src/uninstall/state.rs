//! Removes what agents leave in the state folder.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::FileTypeExt as _},
    path::{Path, PathBuf},
};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::{admin, handover};
use kiam_kernel::guard::is_boot_note;
use kiam_requests::imds;

/// Removes what dead agents left in `state_dir`: sockets that nobody listens at, links that lead nowhere and, where no
/// agent runs or starts, the key of the session tokens. Then the folder, if it is empty. Returns what it removed.
///
/// An agent with pins shows there that it runs (not `unused`); one with `--interceptor=off` shows it by its socket alone.
///
/// # Errors
///
/// The path that can't be read or removed, and the system's answer.
pub(super) fn remove(state_dir: &Path, unused: bool) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| (path, error)
    };
    let entries = match fs::read_dir(state_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(state_dir)(error)),
    };
    let mut removed = Vec::new();
    // Links after what they lead to.
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort_by_key(|path| path.is_symlink());
    let unused = unused && !paths.iter().any(|path| is_agents(path) && is_open(path));
    for path in paths {
        if !is_left(&path, unused) {
            continue;
        }
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&path)(error)),
        }
    }
    // Others' files keep it, and so does a mount.
    if fs::remove_dir(state_dir).is_ok() {
        removed.push(state_dir.to_owned());
    }
    Ok(removed)
}

/// Connects without waiting for room in the queue of a socket that nobody accepts from.
fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Whether an agent made the file and none uses it.
fn is_left(path: &Path, unused: bool) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    if imds::is_key_file(name) {
        return unused;
    }
    // The rules that it is about are removed as well.
    if is_boot_note(name) {
        return true;
    }
    let Ok(status) = fs::symlink_metadata(path) else { return false };
    match (status.file_type().is_socket(), status.is_symlink()) {
        _ if !is_agents(path) => false,
        (true, _) => !is_open(path),
        (_, true) => !path.exists(),
        _ => false,
    }
}

/// Whether it is called as agents' sockets and the links to them are.
fn is_agents(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let visible = name.strip_prefix('.').unwrap_or(name);
    let begins = [admin::SOCKET, handover::SOCKET].map(|socket| socket.trim_end_matches("sock"));
    begins.iter().any(|begin| visible.starts_with(begin))
}

/// Whether somebody listens at this socket, or may: one that is full or hangs is somebody's.
fn is_open(path: &Path) -> bool {
    let is_socket = fs::metadata(path).is_ok_and(|status| status.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    is_socket && !connect(path).is_err_and(refused)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::symlink, net::UnixListener},
        sync::mpsc,
        thread,
        time::Duration,
    };

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_dead_agents_left_goes_and_what_is_in_use_or_others_stays() {
        let parent = tempfile::tempdir().unwrap();
        let state = parent.path().join("kiam");
        fs::create_dir(&state).unwrap();
        let socket = |name: &str| UnixListener::bind(state.join(name)).unwrap();
        for dead in ["admin.0123.sock", ".admin.0123.sock", "handover.sock", ".handover.sock.7"] {
            drop(socket(dead));
        }
        let alive = socket("admin.4567.sock");
        symlink("admin.0123.sock", state.join("admin.sock")).unwrap();
        symlink("admin.0123.sock", state.join(".admin.0123.sock.link")).unwrap();
        let notes = ["boot-guard", "boot-guard.new"];
        for file in ["token.key", ".token.key.0123", "admin.txt", "somebody's"].iter().chain(&notes)
        {
            fs::write(state.join(file), "").unwrap();
        }
        // An agent hangs.
        assert_eq!(remove(&state, false).unwrap().len(), 8);
        let stay = [".token.key.0123", "admin.4567.sock", "admin.txt", "somebody's", "token.key"];
        assert_eq!(names(&state), stay);
        // One without interceptor has no pins in use.
        assert!(remove(&state, true).unwrap().is_empty(), "the key is in use");
        assert_eq!(names(&state), stay);
        drop(alive);
        assert_eq!(remove(&state, true).unwrap().len(), 3);
        assert_eq!(names(&state), ["admin.txt", "somebody's"]);
        for file in names(&state) {
            fs::remove_file(state.join(file)).unwrap();
        }
        assert_eq!(remove(&state, true).unwrap(), std::slice::from_ref(&state));
        assert!(remove(&state, true).unwrap().is_empty(), "nothing is there");
    }

    #[test]
    fn a_hung_agent_whose_socket_is_full_keeps_its_socket_and_nobody_waiting() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join("admin.0123.sock");
        let hung = UnixListener::bind(&path).unwrap();
        net::listen(&hung, 0).unwrap();
        let mut probes = Vec::new();
        let full = loop {
            match connect(&path) {
                Ok(probe) => probes.push(probe),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let (done, left) = mpsc::channel();
        let folder = state.path().to_owned();
        thread::spawn(move || done.send(remove(&folder, false).unwrap()));
        let removed = left.recv_timeout(Duration::from_secs(20)).expect("it does not wait");
        assert!(removed.is_empty() && path.exists(), "{removed:?}");
    }
}

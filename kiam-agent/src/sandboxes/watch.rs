//! Notices what happens to the pods' cgroups, as deep as the kubelet and the runtime make them.
//!
//! mkdir and rmdir reach inotify as on any file system, and `cgroup.events` is modified when the first process
//! comes or the last one goes; but a worker of the kernel tells that, which takes milliseconds on a busy node. Who writes
//! a process's number into `cgroup.procs` is seen at once, and once a cgroup: containers can write their own as often as
//! they like. A watch is not ended by the removal of its cgroup, so that is done here.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::pods::{PodUid, is_qos_class};

/// Cgroups of one pod that are watched; the sweep sees what happens in others.
const CONTAINERS: usize = 64;
/// Pods that are watched: more than a node runs.
const PODS: usize = 4096;
/// What is read at once.
const BUFFER: usize = 16 * 1024;

/// What happened to a pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It was made, or found.
    Made(PodUid, PathBuf),
    /// Containers or processes came or went.
    Stirred(PodUid),
    /// The first process was put into one of its containers since that is watched.
    Joined(PodUid),
    /// It was removed.
    Removed(PodUid),
    /// Changes were lost: look at everything.
    Lost,
}

/// Tells when there are changes.
pub(super) type Events = AsyncFd<Arc<OwnedFd>>;

/// The watches.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Arc<OwnedFd>,
    root: PathBuf,
    /// The pods' cgroup and those of QoS classes, by path.
    folders: HashMap<PathBuf, Folder>,
    pods: HashMap<PodUid, Pod>,
    /// What each watch is for.
    places: HashMap<i32, Place>,
    /// Whether it was told that there are no more watches to have.
    told: bool,
}

/// A cgroup that pods' cgroups are in.
#[derive(Debug)]
struct Folder {
    inode: u64,
    watch: i32,
}

#[derive(Debug)]
struct Pod {
    path: PathBuf,
    inode: u64,
    /// Its folder's and its `cgroup.events`'.
    watches: Vec<i32>,
    /// Its containers' `cgroup.events`' and `cgroup.procs`', by the cgroup's name.
    containers: HashMap<Box<OsStr>, Vec<i32>>,
}

#[derive(Clone, Debug)]
enum Place {
    Folder(PathBuf),
    Pod(PodUid),
    Events(PodUid),
    Processes(PodUid),
}

// === impl Watch ===

impl Watch {
    /// Watches nothing yet: [`Watch::sweep`] begins.
    pub(super) fn new(root: PathBuf) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self {
            inotify: Arc::new(inotify),
            root,
            folders: HashMap::new(),
            pods: HashMap::new(),
            places: HashMap::new(),
            told: false,
        })
    }

    /// What [`Watch::changes`] waits for; made on the runtime that waits, as it is woken by the one it was made on.
    pub(super) fn events(&self) -> io::Result<Events> {
        #[expect(
            deprecated,
            reason = "unsound only for what may change its descriptor, and an `OwnedFd` can't; the new way is unsafe"
        )]
        AsyncFd::new(Arc::clone(&self.inotify))
    }

    /// The next changes; `events` are this watch's.
    pub(super) async fn changes(&mut self, events: &Events) -> io::Result<Vec<Change>> {
        loop {
            let mut ready = events.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); BUFFER];
            // One read: the reader goes on reading when its buffer is empty.
            let mut reader = Reader::new(ready.get_inner(), &mut buffer);
            let mut seen = Vec::new();
            let outcome = loop {
                match reader.next() {
                    Ok(event) => {
                        let name = event.file_name().map(|name| name.to_bytes().to_vec());
                        seen.push((event.wd(), event.events(), name));
                    }
                    Err(error) => break error,
                }
                if reader.is_buffer_empty() {
                    break Errno::AGAIN;
                }
            };
            match outcome {
                Errno::AGAIN if seen.is_empty() => {
                    ready.clear_ready();
                    continue;
                }
                Errno::AGAIN | Errno::INTR => {}
                error => return Err(error.into()),
            }
            let mut changes = Vec::new();
            for (watch, flags, name) in seen {
                self.take(watch, flags, name.as_deref().map(OsStr::from_bytes), &mut changes);
            }
            return Ok(changes);
        }
    }

    /// Whether the pods' cgroup is another one than is watched.
    pub(super) fn is_moved(&self) -> bool {
        inode(&self.root) != self.folders.get(&self.root).map(|folder| folder.inode)
    }

    /// Compares what is watched with what is there.
    pub(super) fn sweep(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        let known = self.folders.iter().map(|(path, folder)| (path.clone(), folder.inode));
        let gone: Vec<_> = known.filter(|(path, is)| inode(path) != Some(*is)).collect();
        gone.iter().for_each(|(path, _)| self.forget_folder(path));
        let known = self.pods.iter().map(|(uid, pod)| (uid.clone(), pod.is_there()));
        let gone: Vec<_> = known.filter(|(_, there)| !there).collect();
        gone.iter().for_each(|(uid, _)| self.forget_pod(uid, &mut changes));
        let known: Vec<PodUid> = self.pods.keys().cloned().collect();
        let root = self.root.clone();
        self.folder(&root, &mut changes);
        for uid in known {
            self.containers(&uid);
            changes.push(Change::Stirred(uid));
        }
        changes
    }

    fn take(
        &mut self,
        watch: i32,
        flags: ReadFlags,
        name: Option<&OsStr>,
        changes: &mut Vec<Change>,
    ) {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            changes.push(Change::Lost);
            return;
        }
        // A watch that was ended since may still have had events in the queue.
        let Some(place) = self.places.get(&watch).cloned() else { return };
        let made = flags.contains(ReadFlags::CREATE);
        match (place, name) {
            (Place::Folder(folder), Some(name)) if made => self.made(&folder, name, changes),
            (Place::Folder(folder), Some(name)) => self.removed(&folder.join(name), changes),
            (Place::Pod(uid), Some(name)) => {
                if made {
                    self.container(&uid, name);
                } else {
                    self.forget_container(&uid, name);
                }
                changes.push(Change::Stirred(uid));
            }
            (Place::Events(uid), _) => changes.push(Change::Stirred(uid)),
            (Place::Processes(uid), _) => {
                // The kernel has ended it.
                self.places.remove(&watch);
                changes.push(Change::Joined(uid));
            }
            (Place::Folder(_) | Place::Pod(_), None) => {}
        }
    }

    /// `name` is in `folder`, which is the pods' cgroup or a QoS class's.
    fn made(&mut self, folder: &Path, name: &OsStr, changes: &mut Vec<Change>) {
        let path = folder.join(name);
        if folder == self.root && name.to_str().is_some_and(is_qos_class) {
            self.folder(&path, changes);
        } else if let Some(uid) =
            path.strip_prefix(&self.root).ok().and_then(PodUid::from_cgroup_path)
        {
            self.pod(uid, path, changes);
        }
    }

    fn removed(&mut self, path: &Path, changes: &mut Vec<Change>) {
        if self.folders.get(path).is_some_and(|folder| inode(path) != Some(folder.inode)) {
            self.forget_folder(path);
        }
        let below = path.strip_prefix(&self.root).ok();
        let Some(uid) = below.and_then(PodUid::from_cgroup_path) else { return };
        // Unless it is there again, and is known to be.
        if self.pods.get(&uid).is_some_and(|pod| pod.path == path && !pod.is_there()) {
            self.forget_pod(&uid, changes);
        }
    }

    /// Watches first and reads then, so that nothing falls between.
    fn folder(&mut self, path: &Path, changes: &mut Vec<Change>) {
        if !self.folders.contains_key(path) {
            let Some(inode) = inode(path) else { return };
            let Some(watch) = self.add(path, folder_flags(), Place::Folder(path.to_owned())) else {
                return;
            };
            self.folders.insert(path.to_owned(), Folder { inode, watch });
        }
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                self.made(path, &entry.file_name(), changes);
            }
        }
    }

    fn pod(&mut self, uid: PodUid, path: PathBuf, changes: &mut Vec<Change>) {
        if let Some(known) = self.pods.get(&uid) {
            if known.path != path || known.is_there() {
                return;
            }
            self.forget_pod(&uid, changes);
        }
        let Some(inode) = inode(&path).filter(|_| self.pods.len() < PODS) else { return };
        let folder = self.add(&path, folder_flags(), Place::Pod(uid.clone()));
        let events =
            self.add(&path.join("cgroup.events"), WatchFlags::MODIFY, Place::Events(uid.clone()));
        let watches = folder.into_iter().chain(events).collect();
        let pod = Pod { path: path.clone(), inode, watches, containers: HashMap::new() };
        self.pods.insert(uid.clone(), pod);
        self.containers(&uid);
        changes.push(Change::Made(uid, path));
    }

    /// Watches the containers' cgroups of a pod that are there.
    fn containers(&mut self, uid: &PodUid) {
        let Some(pod) = self.pods.get(uid) else { return };
        let entries = fs::read_dir(&pod.path).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names: Vec<_> = folders.map(|entry| entry.file_name()).collect();
        let gone =
            pod.containers.keys().filter(|known| !names.iter().any(|name| **name == ***known));
        let gone: Vec<_> = gone.cloned().collect();
        gone.iter().for_each(|name| self.forget_container(uid, name));
        names.iter().for_each(|name| self.container(uid, name));
    }

    fn container(&mut self, uid: &PodUid, name: &OsStr) {
        let Some(pod) = self.pods.get(uid) else { return };
        if pod.containers.len() == CONTAINERS && !pod.containers.contains_key(name) {
            return;
        }
        let container = pod.path.join(name);
        // The same number for the same cgroup; another one when it was made anew.
        let (events, place) = (container.join("cgroup.events"), Place::Events(uid.clone()));
        let Some(events) = self.add(&events, WatchFlags::MODIFY, place) else { return };
        let (processes, place) = (container.join("cgroup.procs"), Place::Processes(uid.clone()));
        let processes = self.add(&processes, WatchFlags::MODIFY | WatchFlags::ONESHOT, place);
        let watches: Vec<i32> = [events].into_iter().chain(processes).collect();
        let pod = self.pods.get_mut(uid);
        let before = pod.and_then(|pod| pod.containers.insert(name.into(), watches.clone()));
        let ended = before.into_iter().flatten().filter(|before| !watches.contains(before));
        ended.for_each(|old| self.end(old));
    }

    fn forget_container(&mut self, uid: &PodUid, name: &OsStr) {
        let pod = self.pods.get_mut(uid);
        // It may have been made anew meanwhile; then what comes next watches it.
        let watches = pod.and_then(|pod| pod.containers.remove(name));
        watches.into_iter().flatten().for_each(|watch| self.end(watch));
    }

    fn forget_pod(&mut self, uid: &PodUid, changes: &mut Vec<Change>) {
        let Some(pod) = self.pods.remove(uid) else { return };
        pod.watches
            .into_iter()
            .chain(pod.containers.into_values().flatten())
            .for_each(|watch| self.end(watch));
        changes.push(Change::Removed(uid.clone()));
    }

    fn forget_folder(&mut self, path: &Path) {
        if let Some(folder) = self.folders.remove(path) {
            self.end(folder.watch);
        }
    }

    /// `None` when `path` is gone already, and when there are no more watches to have.
    fn add(&mut self, path: &Path, flags: WatchFlags, place: Place) -> Option<i32> {
        match inotify::add_watch(&self.inotify, path, flags) {
            Ok(watch) => {
                self.places.insert(watch, place);
                Some(watch)
            }
            Err(Errno::NOENT | Errno::NODEV) => None,
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    warn!(path = %path.display(), %error, "A cgroup can't be watched, so that new pods are noticed late; raise fs.inotify.max_user_watches");
                }
                None
            }
        }
    }

    fn end(&mut self, watch: i32) {
        self.places.remove(&watch);
        // An error means that the kernel has ended it.
        let _ = inotify::remove_watch(&self.inotify, watch);
    }
}

// === impl Pod ===

impl Pod {
    fn is_there(&self) -> bool {
        inode(&self.path) == Some(self.inode)
    }
}

fn folder_flags() -> WatchFlags {
    WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR
}

/// Which cgroup is at `path`: numbers are not used again.
fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

#[cfg(test)]
mod tests;

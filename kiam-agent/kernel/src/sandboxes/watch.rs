//! Notices what happens to the pods' cgroups, as deep as the kubelet and the runtime make them.
//!
//! mkdir and rmdir reach inotify as on any file system, and `cgroup.events` is modified when the first process
//! comes or the last one goes; but a worker of the kernel tells that, which takes milliseconds on a busy node. Who writes
//! a process's number into `cgroup.procs` is seen at once, and once a cgroup. Containers can write either file as often as
//! they like, so that a watch of `cgroup.events` is for one event as well, and rests after it, and those of a pod rest one after
//! the other: however many containers it has, it is noticed as often as a pod with one. A watch is not ended by the
//! removal of its cgroup, so that is done here.
//!
//! The system may refuse watches: the limits of inotify are for everything that root runs on the node. What is not watched is
//! found by a sweep, and each sweep tries to watch it again.

mod spent;

use std::{
    collections::{HashMap, VecDeque},
    ffi::{OsStr, OsString},
    fs,
    future::pending,
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::inotify::{ReadFlags, WatchFlags};
use tokio::time::{Instant, sleep_until};

use self::spent::Spent;
use super::watches::{WatchTarget, Watches};
use kiam_core::pods::{PodUid, is_qos_class};

/// Cgroups of one pod that are watched; the sweep sees what happens in others.
const CONTAINERS: usize = 64;
/// Pods that are watched: more than a node runs.
const PODS: usize = 4096;
/// What happened to a pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// It was made, or found.
    Created(PodUid, PathBuf),
    /// Containers or processes came or went.
    Members(PodUid),
    /// The first process was put into one of its containers since that is watched.
    FirstProcess(PodUid),
    /// It was removed.
    Removed(PodUid),
    /// Changes were lost: look at everything.
    Lost,
}

/// The watches.
#[derive(Debug)]
pub(super) struct Watch {
    watches: Watches,
    root: PathBuf,
    /// The pods' cgroup and those of QoS classes, by path.
    folders: HashMap<PathBuf, Folder>,
    pods: HashMap<PodUid, Pod>,
    /// Watches of `cgroup.events` that have ended by an event, in the order in which they will have rested.
    spent: VecDeque<Spent>,
}

/// A cgroup that pods' cgroups are in.
#[derive(Debug)]
struct Folder {
    inode: u64,
    /// `None`: refused.
    watch: Option<i32>,
}

#[derive(Debug)]
struct Pod {
    path: PathBuf,
    inode: u64,
    /// Its folder's and its `cgroup.events`', but for those that were refused.
    watches: Vec<i32>,
    /// The same of its containers' `cgroup.events` and `cgroup.procs`, by the cgroup's name.
    containers: HashMap<Box<OsStr>, Vec<i32>>,
    /// When the last of those that rest will have rested.
    rest_until: Instant,
}

// === impl Watch ===

impl Watch {
    /// Watches nothing yet: [`Watch::sweep`] begins.
    pub(super) fn new(root: PathBuf) -> Self {
        let (folders, pods) = (HashMap::new(), HashMap::new());
        Self { watches: Watches::default(), root, folders, pods, spent: VecDeque::new() }
    }

    /// The next changes; none while there is no inotify. To be waited for on the runtime that sweeps are made on.
    pub(super) async fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        let rested = self.spent.front().map(|spent| spent.rests_until);
        let rest = async {
            match rested {
                Some(until) => sleep_until(until).await,
                None => pending().await,
            }
        };
        let seen = tokio::select! {
            seen = self.watches.next() => Some(seen),
            () = rest => None,
        };
        match seen {
            Some(Ok(seen)) => {
                for (watch, flags, name) in seen {
                    self.take(watch, flags, name.as_deref().map(OsStr::from_bytes), &mut changes);
                }
            }
            Some(Err(error)) => self.unwatch(&error),
            None => self.renew(Instant::now(), &mut changes),
        }
        changes
    }

    /// How many watches are missing, because the system refuses them. Without some, changes are found by
    /// [`Watch::catch_up`] alone.
    pub(super) fn refused(&self) -> u64 {
        self.watches.refused()
    }

    /// Whether the pods' cgroup is another one than is watched.
    pub(super) fn is_moved(&self) -> bool {
        inode(&self.root) != self.folders.get(&self.root).map(|folder| folder.inode)
    }

    /// Compares the watches with the cgroups that exist, and has all pods scanned.
    pub(super) fn sweep(&mut self) -> Vec<Change> {
        self.compare(true)
    }

    /// A sweep that costs little where most is watched: of the pods that are known, it is only for those that are not.
    pub(super) fn catch_up(&mut self) -> Vec<Change> {
        self.compare(false)
    }

    fn compare(&mut self, all: bool) -> Vec<Change> {
        self.watches.begin();
        let mut changes = Vec::new();
        let known = self.folders.iter().map(|(path, folder)| (path.clone(), folder.inode));
        let gone: Vec<_> = known.filter(|(path, is)| inode(path) != Some(*is)).collect();
        gone.iter().for_each(|(path, _)| self.forget_folder(path));
        let known = self.pods.iter().map(|(uid, pod)| (uid.clone(), pod.is_there()));
        let gone: Vec<_> = known.filter(|(_, there)| !there).collect();
        gone.iter().for_each(|(uid, _)| self.forget_pod(uid, &mut changes));
        let known = self.pods.iter().filter(|(_, pod)| all || !pod.is_watched());
        let known: Vec<PodUid> = known.map(|(uid, _)| uid.clone()).collect();
        let root = self.root.clone();
        // First: a watch of a folder is worth more than one of a pod.
        self.folder(&root, &mut changes);
        for uid in known {
            self.watch_pod(&uid);
            let stirred = self.containers(&uid);
            changes.push(if all || stirred {
                Change::Members(uid)
            } else {
                Change::FirstProcess(uid)
            });
        }
        self.watches.complete();
        changes
    }

    /// There are no watches any more; what is known stays.
    fn unwatch(&mut self, error: &io::Error) {
        self.watches.lose(error);
        self.folders.values_mut().for_each(|folder| folder.watch = None);
        for pod in self.pods.values_mut() {
            pod.watches.clear();
            pod.containers.values_mut().for_each(Vec::clear);
        }
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
        let Some(place) = self.watches.place(watch) else { return };
        let made = flags.contains(ReadFlags::CREATE);
        match (place, name) {
            (WatchTarget::Folder(folder), Some(name)) if made => self.made(&folder, name, changes),
            (WatchTarget::Folder(folder), Some(name)) => self.removed(&folder.join(name), changes),
            (WatchTarget::Pod(uid), Some(name)) => {
                if made {
                    self.container(&uid, name);
                } else {
                    self.forget_container(&uid, name);
                }
                changes.push(Change::Members(uid));
            }
            // The kernel says that the watch has ended, too.
            (WatchTarget::Events(pod, container), _) if flags.contains(ReadFlags::MODIFY) => {
                self.watches.ended(watch);
                changes.push(Change::Members(pod.clone()));
                self.spend(watch, pod, container);
            }
            (WatchTarget::Events(..), _) => {}
            (WatchTarget::Processes(uid), _) => {
                self.watches.ended(watch);
                changes.push(Change::FirstProcess(uid));
            }
            (WatchTarget::Folder(_) | WatchTarget::Pod(_), None) => {}
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
        let Some(inode) = inode(path) else { return };
        if self.folders.get(path).is_some_and(|known| known.inode != inode) {
            self.forget_folder(path);
        }
        let known = self.folders.get(path).and_then(|known| known.watch);
        let watch = known.or_else(|| {
            self.watches.add(path, folder_flags(), WatchTarget::Folder(path.to_owned()))
        });
        self.folders.insert(path.to_owned(), Folder { inode, watch });
        for name in self.below(path).unwrap_or_default() {
            self.made(path, &name, changes);
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
        let (watches, containers, rest_until) = (Vec::new(), HashMap::new(), Instant::now());
        let pod = Pod { path: path.clone(), inode, watches, containers, rest_until };
        self.pods.insert(uid.clone(), pod);
        self.watch_pod(&uid);
        self.containers(&uid);
        changes.push(Change::Created(uid, path));
    }

    fn watch_pod(&mut self, uid: &PodUid) {
        let missing = self.pods.get(uid).filter(|pod| pod.watches.len() < 2);
        let Some(path) = missing.map(|pod| pod.path.clone()) else { return };
        // The same number for what is watched already.
        let folder = self.watches.add(&path, folder_flags(), WatchTarget::Pod(uid.clone()));
        let events = self.watch_events(&path, uid, None);
        if let Some(pod) = self.pods.get_mut(uid) {
            pod.watches = folder.into_iter().chain(events).collect();
        }
    }

    /// Watches the containers' cgroups of a pod that are there; whether they are others than were known.
    fn containers(&mut self, uid: &PodUid) -> bool {
        let Some(path) = self.pods.get(uid).map(|pod| pod.path.clone()) else { return false };
        let Some(names) = self.below(&path) else { return false };
        let Some(pod) = self.pods.get(uid) else { return false };
        let before = pod.containers.len();
        let gone =
            pod.containers.keys().filter(|known| !names.iter().any(|name| **name == ***known));
        let gone: Vec<_> = gone.cloned().collect();
        gone.iter().for_each(|name| self.forget_container(uid, name));
        names.iter().for_each(|name| self.container(uid, name));
        !gone.is_empty() || self.pods.get(uid).is_some_and(|pod| pod.containers.len() != before)
    }

    fn container(&mut self, uid: &PodUid, name: &OsStr) {
        let Some(pod) = self.pods.get(uid) else { return };
        if pod.containers.len() == CONTAINERS && !pod.containers.contains_key(name) {
            return;
        }
        let container = pod.path.join(name);
        // The same number for the same cgroup; another one when it was made anew.
        let events = self.watch_events(&container, uid, Some(name.into()));
        let (processes, place) =
            (container.join("cgroup.procs"), WatchTarget::Processes(uid.clone()));
        let processes =
            self.watches.add(&processes, WatchFlags::MODIFY | WatchFlags::ONESHOT, place);
        let watches: Vec<i32> = events.into_iter().chain(processes).collect();
        let pod = self.pods.get_mut(uid);
        let before = pod.and_then(|pod| pod.containers.insert(name.into(), watches.clone()));
        let ended = before.into_iter().flatten().filter(|before| !watches.contains(before));
        ended.for_each(|old| self.watches.end(old));
    }

    fn forget_container(&mut self, uid: &PodUid, name: &OsStr) {
        let pod = self.pods.get_mut(uid);
        // It may have been made anew meanwhile; then what comes next watches it.
        let watches = pod.and_then(|pod| pod.containers.remove(name));
        watches.into_iter().flatten().for_each(|watch| self.watches.end(watch));
    }

    fn forget_pod(&mut self, uid: &PodUid, changes: &mut Vec<Change>) {
        let Some(pod) = self.pods.remove(uid) else { return };
        pod.watches
            .into_iter()
            .chain(pod.containers.into_values().flatten())
            .for_each(|watch| self.watches.end(watch));
        changes.push(Change::Removed(uid.clone()));
    }

    fn forget_folder(&mut self, path: &Path) {
        if let Some(watch) = self.folders.remove(path).and_then(|folder| folder.watch) {
            self.watches.end(watch);
        }
    }

    /// The cgroups in one; `None` when that is gone or can't be read.
    fn below(&mut self, path: &Path) -> Option<Vec<OsString>> {
        match fs::read_dir(path) {
            Ok(entries) => {
                let entries = entries.flatten();
                let folders =
                    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
                Some(folders.map(|entry| entry.file_name()).collect())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // Such as for want of descriptors.
            Err(error) => {
                self.watches.refuse(&error);
                None
            }
        }
    }
}

// === impl Pod ===

impl Pod {
    fn is_there(&self) -> bool {
        inode(&self.path) == Some(self.inode)
    }

    fn is_watched(&self) -> bool {
        self.watches.len() == 2 && self.containers.values().all(|watches| watches.len() == 2)
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

//! Watches the pods' cgroups, as deep as the kubelet and the runtime create them.
//!
//! inotify shows mkdir and rmdir. It shows a modification of `cgroup.events` when the first process comes or the last one
//! goes, but by a kernel worker, which takes milliseconds on a busy node. A write to `cgroup.procs` is shown at once, and
//! is watched for once per cgroup. Containers can cause events of either file as often as they like. So a watch of
//! `cgroup.events` is for one event as well and then rests, and those of a pod rest one after the other: a pod with many
//! containers causes no more events than a pod with one. A watch does not end with its cgroup, so it is ended here.
//!
//! inotify's limits count everything that root runs on the node, so watches may fail. A sweep finds cgroups without a
//! watch, and tries to watch them again.

mod above;
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

/// The most watched cgroups of one pod. Sweeps find changes in others.
const CONTAINERS: usize = 64;
/// The most watched pods: more than a node runs.
const PODS: usize = 4096;
/// A change of a pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The cgroup was created, or found.
    Created(PodUid, PathBuf),
    /// Containers or processes came or went.
    Members(PodUid),
    /// A sweep came by, and found nothing new.
    Swept(PodUid),
    /// The first process since the watch began was put into one of its containers.
    FirstProcess(PodUid),
    /// The cgroup was removed.
    Removed(PodUid),
    /// The pods' cgroup itself was created or removed.
    Moved,
    /// Changes were lost: all pods must be scanned.
    Lost,
}

/// The watches of all pods' cgroups.
#[derive(Debug)]
pub(super) struct Watch {
    watches: Watches,
    root: PathBuf,
    /// The watches of the folders above `root`, up to the mount point.
    above: Vec<i32>,
    /// Whether all of these are watched.
    sees_root: bool,
    /// The pods' cgroup and those of QoS classes, by path.
    folders: HashMap<PathBuf, Folder>,
    pods: HashMap<PodUid, Pod>,
    /// Watches of `cgroup.events` that ended by an event, in the order in which their rests end.
    spent: VecDeque<Spent>,
}

/// A cgroup that contains pods' cgroups.
#[derive(Debug)]
struct Folder {
    inode: u64,
    /// The watch; `None` if it failed.
    watch: Option<i32>,
}

#[derive(Debug)]
struct Pod {
    path: PathBuf,
    inode: u64,
    /// The watches of its folder and its `cgroup.events`, without failed ones.
    watches: Vec<i32>,
    /// The watches of its containers' `cgroup.events` and `cgroup.procs`, by the cgroup's name.
    containers: HashMap<Box<OsStr>, Vec<i32>>,
    /// The end of the last rest of its watches.
    rest_until: Instant,
}

// === impl Watch ===

impl Watch {
    /// No watches yet; [`Watch::sweep`] adds them.
    pub(super) fn new(root: PathBuf) -> Self {
        let (folders, pods) = (HashMap::new(), HashMap::new());
        let (watches, spent) = (Watches::default(), VecDeque::new());
        Self { watches, root, above: Vec::new(), sees_root: false, folders, pods, spent }
    }

    /// Waits for the next changes, for ever without inotify. It must run on the same runtime as the sweeps.
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

    /// The number of missing watches. Changes of their cgroups are found by [`Watch::catch_up`] alone.
    pub(super) fn refused(&self) -> u64 {
        self.watches.refused()
    }

    /// Compares the watches with the cgroups that exist, and has all pods scanned.
    pub(super) fn sweep(&mut self) -> Vec<Change> {
        self.compare(true)
    }

    /// A cheap sweep: of the known pods, it checks only those without all watches.
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
        // First, since a watch of a folder is worth more than one of a pod.
        self.watch_above();
        let root = self.root.clone();
        self.folder(&root, &mut changes);
        for uid in known {
            self.watch_pod(&uid);
            let stirred = self.containers(&uid);
            changes.push(match (stirred, all) {
                (true, _) => Change::Members(uid),
                (false, true) => Change::Swept(uid),
                (false, false) => Change::FirstProcess(uid),
            });
        }
        self.watches.complete();
        changes
    }

    /// Drops all watches after an error, and keeps the known cgroups.
    fn unwatch(&mut self, error: &io::Error) {
        self.watches.lose(error);
        (self.above, self.sees_root) = (Vec::new(), false);
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
        // The queue may still have events of an ended watch.
        let Some(place) = self.watches.place(watch) else { return };
        let made = flags.contains(ReadFlags::CREATE);
        match (place, name) {
            (WatchTarget::Above(below), Some(name)) if *below == *name => {
                changes.push(Change::Moved);
            }
            (WatchTarget::Above(_), _) => {}
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
            // Another event shows the end of the watch.
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

    /// Adds `name` in `folder`, which is the pods' cgroup or a QoS class's.
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
        // Unless it was recreated, and is known already.
        if self.pods.get(&uid).is_some_and(|pod| pod.path == path && !pod.is_there()) {
            self.forget_pod(&uid, changes);
        }
    }

    /// Watches the folder, and then reads it, so that no change is missed.
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
        // An existing watch keeps its number.
        let folder = self.watches.add(&path, folder_flags(), WatchTarget::Pod(uid.clone()));
        let events = self.watch_events(&path, uid, None);
        if let Some(pod) = self.pods.get_mut(uid) {
            pod.watches = folder.into_iter().chain(events).collect();
        }
    }

    /// Watches the current containers' cgroups of a pod, and returns whether they changed or had an unread event.
    fn containers(&mut self, uid: &PodUid) -> bool {
        let Some(path) = self.pods.get(uid).map(|pod| pod.path.clone()) else { return false };
        let Some(names) = self.below(&path) else { return false };
        let Some(pod) = self.pods.get(uid) else { return false };
        let before = pod.containers.len();
        let gone =
            pod.containers.keys().filter(|known| !names.iter().any(|name| **name == ***known));
        let gone: Vec<_> = gone.cloned().collect();
        gone.iter().for_each(|name| self.forget_container(uid, name));
        let mut unread = false;
        for name in &names {
            unread |= self.container(uid, name);
        }
        let others = self.pods.get(uid).is_some_and(|pod| pod.containers.len() != before);
        unread || others || !gone.is_empty()
    }

    /// Watches a container's cgroup; whether that ended a watch whose event was not read yet, and is not going to be.
    fn container(&mut self, uid: &PodUid, name: &OsStr) -> bool {
        let Some(pod) = self.pods.get(uid) else { return false };
        if pod.containers.len() == CONTAINERS && !pod.containers.contains_key(name) {
            return false;
        }
        let container = pod.path.join(name);
        // The same cgroup keeps its number. A recreated one gets another.
        let events = self.watch_events(&container, uid, Some(name.into()));
        let (processes, place) =
            (container.join("cgroup.procs"), WatchTarget::Processes(uid.clone()));
        let processes =
            self.watches.add(&processes, WatchFlags::MODIFY | WatchFlags::ONESHOT, place);
        let watches: Vec<i32> = events.into_iter().chain(processes).collect();
        let pod = self.pods.get_mut(uid);
        let before = pod.and_then(|pod| pod.containers.insert(name.into(), watches.clone()));
        let mut unread = false;
        for old in before.into_iter().flatten().filter(|before| !watches.contains(before)) {
            // Of one that had its event, and that was read, there is no place any more.
            unread |= self.watches.place(old).is_some();
            self.watches.end(old);
        }
        unread
    }

    fn forget_container(&mut self, uid: &PodUid, name: &OsStr) {
        let pod = self.pods.get_mut(uid);
        // It may have been recreated meanwhile. Then a later event watches it.
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

    /// The cgroups in `path`; `None` if it is gone or can't be read.
    fn below(&mut self, path: &Path) -> Option<Vec<OsString>> {
        match fs::read_dir(path) {
            Ok(entries) => {
                let entries = entries.flatten();
                let folders =
                    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
                Some(folders.map(|entry| entry.file_name()).collect())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            // For example without free descriptors.
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

/// The inode number of the cgroup at `path`. Numbers are not reused.
fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

#[cfg(test)]
mod tests;

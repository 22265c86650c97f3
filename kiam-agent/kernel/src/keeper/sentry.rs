//! The keeper's sentry: a thread that sees when something of the agent's in the kernel has changed, and asks little for it.
//!
//! inotify shows at once that the pods' cgroup, or that of a QoS class, was created or removed. The kernel has no event for a
//! link that is detached, so the sentry compares links and the pins' folders once a second. It has a thread of its own, since
//! what it asks may wait for the kernel's lock of cgroups, and a task would wake two more threads each time.

use std::{
    ffi::OsStr,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify::{self, CreateFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::sync::{Notify, oneshot};
use tracing::warn;

use super::SCAN;
use crate::intercept::Snapshot;
use kiam_core::pods::is_qos_class;

/// The time between two comparisons.
const LOOK: Duration = Duration::from_secs(1);
/// The buffer of one read of events.
const BUFFER: usize = 4096;

/// The sentry, which stands as long as this lives.
pub(super) struct Sentry {
    shared: Arc<Shared>,
    /// Ends with the thread.
    ended: oneshot::Receiver<()>,
}

/// What the thread and the keeper share.
#[derive(Default)]
struct Shared {
    /// The state to compare; `None` while the keeper does not rely on the sentry.
    expected: Mutex<Option<Arc<Snapshot>>>,
    noticed: Notify,
}

/// The watches of the pods' cgroup and of the folder above it.
#[derive(Default)]
struct CgroupWatch {
    /// `None` while no instance can be created.
    inotify: Option<OwnedFd>,
    cgroup: PathBuf,
    watches: [Option<i32>; 2],
    /// Whether it was logged that there is no watch.
    logged: bool,
}

// === impl Sentry ===

impl Sentry {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// The system gives none.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let (running, ended) = oneshot::channel::<()>();
        let seen_by_thread = Arc::downgrade(&shared);
        thread::Builder::new().name("sentry".to_owned()).spawn(move || {
            stand(&seen_by_thread);
            drop(running);
        })?;
        Ok(Self { shared, ended })
    }

    /// Compares the kernel's state with `expected` from now on.
    pub(super) fn expect(&self, expected: Snapshot) {
        *self.shared.expected() = Some(Arc::new(expected));
    }

    /// Waits until the state is another than was expected, and forgets that one. `false` if the thread has ended.
    pub(super) async fn noticed(&mut self) -> bool {
        tokio::select! {
            () = self.shared.noticed.notified() => true,
            _ = &mut self.ended => false,
        }
    }
}

// === impl Shared ===

impl Shared {
    fn expected(&self) -> MutexGuard<'_, Option<Arc<Snapshot>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compares once, unless an event has shown that something `changed`. Returns whether there was a state to compare.
    fn compare(&self, changed: bool) -> bool {
        let Some(expected) = self.expected().clone() else { return false };
        if changed || !expected.holds() {
            // Unless the keeper expects another one by now.
            let same = |now: &mut Arc<Snapshot>| Arc::ptr_eq(now, &expected);
            if self.expected().take_if(same).is_some() {
                self.noticed.notify_one();
            }
        }
        true
    }
}

/// The thread: until the keeper is gone.
fn stand(shared: &Weak<Shared>) {
    let (mut watch, mut stirred) = (CgroupWatch::default(), false);
    loop {
        let Some(there) = shared.upgrade() else { return };
        let cgroup = there.expected().as_ref().map(|expected| expected.cgroup().to_owned());
        let watched = cgroup.is_none_or(|cgroup| watch.follow(&cgroup));
        // An event that comes while the keeper is at work counts later.
        stirred &= !there.compare(stirred || !watched);
        drop(there);
        stirred |= watch.wait(if watched { LOOK } else { SCAN });
    }
}

// === impl CgroupWatch ===

impl CgroupWatch {
    /// Watches `cgroup` and the folder above it, which may be others than before. Returns whether both are watched.
    fn follow(&mut self, cgroup: &Path) -> bool {
        if self.inotify.is_none() {
            let flags = CreateFlags::NONBLOCK | CreateFlags::CLOEXEC;
            self.inotify = inotify::init(flags).map_err(|error| self.report(error)).ok();
        }
        cgroup.clone_into(&mut self.cgroup);
        let above = cgroup.parent().unwrap_or(cgroup);
        let watched = [self.add(above, 0), self.add(cgroup, 1)];
        watched == [true, true]
    }

    fn add(&mut self, folder: &Path, place: usize) -> bool {
        let Some(inotify) = &self.inotify else { return false };
        let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR;
        let added = inotify::add_watch(inotify, folder, flags);
        let watch = added.as_ref().ok().copied();
        let before = self.watches[place];
        if let Some(gone) = before.filter(|_| before != watch) {
            // An error means that the kernel has ended it.
            let _ = inotify::remove_watch(inotify, gone);
        }
        self.watches[place] = watch;
        added.map_err(|error| self.report(error)).is_ok()
    }

    fn report(&mut self, error: Errno) {
        let gone = matches!(error, Errno::NOENT | Errno::NODEV);
        if !gone && !std::mem::replace(&mut self.logged, true) {
            warn!(%error, "The folder of the pods' cgroup can't be watched, so it is looked at five times a second; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances");
        }
    }

    /// Waits for an event that concerns the agent, or for `time`. Returns whether one came.
    fn wait(&self, time: Duration) -> bool {
        let Some(inotify) = &self.inotify else {
            thread::sleep(time);
            return false;
        };
        let limit = Timespec::try_from(time).ok();
        match poll(&mut [PollFd::new(inotify, PollFlags::IN)], limit.as_ref()) {
            Ok(0) | Err(_) => false,
            Ok(_) => self.read(inotify),
        }
    }

    /// Reads all events; whether one is of the pods' cgroup or of a QoS class, or cannot be told.
    fn read(&self, inotify: &OwnedFd) -> bool {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(inotify, &mut buffer);
        let mut concerns = false;
        while let Ok(event) = reader.next() {
            concerns |= event.file_name().is_none_or(|name| {
                let name = OsStr::from_bytes(name.to_bytes());
                Some(name) == self.cgroup.file_name() || name.to_str().is_some_and(is_qos_class)
            });
        }
        concerns
    }
}

//! Watches of files by inotify.
//!
//! inotify's limits count everything that root runs on the node, so that other programs can exhaust them. Missing watches
//! are counted and logged, and [`Watches::begin`] tries again.

use std::{
    collections::HashMap,
    ffi::OsStr,
    future, io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use kiam_core::{pods::PodUid, telemetry::LogLimit};

/// The buffer of one read.
const BUFFER: usize = 16 * 1024;
/// The shortest time between two log lines about failed watches.
const LOG_PERIOD: Duration = Duration::from_secs(60);

/// The file or folder of a watch.
#[derive(Clone, Debug)]
pub(super) enum WatchTarget {
    /// A folder above the pods' cgroup, in which the one of this name leads there.
    Above(Box<OsStr>),
    Folder(PathBuf),
    Pod(PodUid),
    /// The pod's `cgroup.events`, or its container's of this name.
    Events(PodUid, Option<Box<OsStr>>),
    Processes(PodUid),
}

/// An event: the watch, what happened, and the name of the file in a folder.
pub(super) type WatchEvent = (i32, ReadFlags, Option<Vec<u8>>);

/// All watches of the process.
#[derive(Debug)]
pub(super) struct Watches {
    /// `None` while no instance can be created.
    inotify: Option<AsyncFd<OwnedFd>>,
    places: HashMap<i32, WatchTarget>,
    /// Watches that failed since [`Watches::begin`].
    refused: u64,
    log: LogLimit<()>,
    /// Whether a failure was logged, and its end was not yet.
    logged: bool,
}

// === impl Watches ===

impl Default for Watches {
    fn default() -> Self {
        let log = LogLimit::new(LOG_PERIOD);
        Self { inotify: None, places: HashMap::new(), refused: 0, log, logged: false }
    }
}

impl Watches {
    /// Begins a round of adding watches, and creates an inotify instance if there is none.
    pub(super) fn begin(&mut self) {
        self.refused = 0;
        if self.inotify.is_some() {
            return;
        }
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        #[expect(
            deprecated,
            reason = "unsound only for what may change its descriptor, and an `OwnedFd` can't; the new way is unsafe"
        )]
        match inotify.map_err(io::Error::from).and_then(AsyncFd::new) {
            Ok(inotify) => self.inotify = Some(inotify),
            Err(error) => self.refuse(&error),
        }
    }

    /// Ends a round of adding watches.
    pub(super) fn complete(&mut self) {
        if self.refused == 0 && std::mem::take(&mut self.logged) {
            info!("All pods' cgroups are watched again");
        }
    }

    /// The number of missing watches.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// Counts and logs a failed watch.
    pub(super) fn refuse(&mut self, error: &io::Error) {
        self.refused += 1;
        if self.log.admit(()).is_some() {
            self.logged = true;
            warn!(
                %error,
                "Some pods' cgroups can't be watched: a sweep every 2 s finds new pods, which are denied until then; raise fs.inotify.max_user_watches and fs.inotify.max_user_instances"
            );
        }
    }

    /// Waits for the next events, for ever without inotify.
    pub(super) async fn next(&self) -> io::Result<Vec<WatchEvent>> {
        match &self.inotify {
            Some(inotify) => read(inotify).await,
            None => future::pending().await,
        }
    }

    pub(super) fn place(&self, watch: i32) -> Option<WatchTarget> {
        self.places.get(&watch).cloned()
    }

    /// Adds a watch and returns its number, which stays the same for an existing watch; `None` if `path` is gone, or the
    /// system returns an error.
    pub(super) fn add(
        &mut self,
        path: &Path,
        flags: WatchFlags,
        place: WatchTarget,
    ) -> Option<i32> {
        let Some(inotify) = &self.inotify else {
            self.refused += 1;
            return None;
        };
        match inotify::add_watch(inotify.get_ref(), path, flags) {
            Ok(watch) => {
                self.places.insert(watch, place);
                Some(watch)
            }
            Err(Errno::NOENT | Errno::NODEV) => None,
            Err(error) => {
                self.refuse(&error.into());
                None
            }
        }
    }

    pub(super) fn end(&mut self, watch: i32) {
        self.ended(watch);
        if let Some(inotify) = &self.inotify {
            // An error means that the kernel has ended it.
            let _ = inotify::remove_watch(inotify.get_ref(), watch);
        }
    }

    /// Forgets a watch that the kernel has ended.
    pub(super) fn ended(&mut self, watch: i32) {
        self.places.remove(&watch);
    }

    /// Drops all watches after an `error` of [`Watches::next`].
    pub(super) fn lose(&mut self, error: &io::Error) {
        (self.inotify, self.places) = (None, HashMap::new());
        self.refuse(error);
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }
}

async fn read(inotify: &AsyncFd<OwnedFd>) -> io::Result<Vec<WatchEvent>> {
    loop {
        let mut ready = inotify.readable().await?;
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        // One read, since the reader would read again when its buffer is empty.
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
            Errno::AGAIN if seen.is_empty() => ready.clear_ready(),
            Errno::AGAIN | Errno::INTR => return Ok(seen),
            error => return Err(error.into()),
        }
    }
}
